"""An exported model to the Hugging Face hub: `toolkit export --push`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.sentences import one_line

_OF_A_MODEL = (
    *("model.safetensors*", "model-0*", "pytorch_model*", "adapter_model.*", "adapter_config.json"),
    *("config.json", "generation_config.json", "chat_template.jinja"),
)
"""Files of a model that was there before: what loads the repository could take them for the one that is uploaded."""


@dataclass(frozen=True)
class Push:
    """A repository of the hub that a folder will go to.

    Args:
        repository: "owner/name".
        public: a repository that is made is for everybody to see; otherwise private.
    """

    repository: str
    public: bool

    @classmethod
    def checked(cls, repository: str, folder: Path, *, public: bool) -> Push:
        """Before `folder` is written: the name, the token, the network, and who could see what is uploaded.

        Raises:
            UserError: any of them is not as it must be; all of `folder` is uploaded, and something is in it.
        """
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        named = f"--push {repository}"
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UserError(f"{named}: {one_line(error)}") from None
        if repository.count("/") != 1:
            raise UserError(f"{named}: say whose it is, as in --push owner/{repository}.")
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{named}: all of {folder} would be uploaded, and it is not empty; give another --out.")
        if not get_token():
            raise UserError(f"{named} needs a token of the hub: `hf auth login`, or set HF_TOKEN.")
        try:
            if _role(_api().whoami()) == "read":
                raise UserError(f"{named}: the token may only read; make one that may write, and `hf auth login`.")
            private = _api().repo_info(repository).private
            if private is False and not public:
                raise UserError(f"{named}: the repository is there and public; give --public to upload to it.")
            if private is True and public:
                raise UserError(
                    f"{named}: the repository is there and private, which --public does not change; make it public in "
                    "its settings, or leave --public out."
                )
        except RepositoryNotFoundError:
            pass
        except HfHubHTTPError as error:
            refused = getattr(error.response, "status_code", None) in (401, 403)
            raise UserError(f"{named}: {'the hub refuses the token: ' if refused else ''}{one_line(error)}") from None
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{named}: the hub cannot be reached: {one_line(error)}") from None
        return cls(repository, public)

    def upload(self, folder: Path, message: str) -> str:
        """Upload `folder`, which has been written, in the place of a model that is there; returns the repository's
        address.

        Raises:
            UserError: it did not get there. The folder stays as it is.
        """
        try:
            made = _api().create_repo(self.repository, private=not self.public, exist_ok=True)
            _api().upload_folder(
                repo_id=self.repository,
                folder_path=folder,
                commit_message=message,
                delete_patterns=list(_OF_A_MODEL),
            )
        except Exception as error:
            flag = "" if self.public else " --private"
            left = "".join(f" --delete {shlex.quote(pattern)}" for pattern in _OF_A_MODEL)
            raise UserError(
                f"{folder} is written, and its upload failed: {one_line(error).rstrip('.')}; try it again with "
                f"`hf upload {self.repository} {shlex.quote(str(folder))}{flag}{left}`."
            ) from None
        return str(made)


def _role(user: Any) -> Any:
    """What a token may do, as the hub says it: "read", "write", ...; None where it does not."""
    for key in ("auth", "accessToken", "role"):
        user = user.get(key) if isinstance(user, dict) else None
    return user


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="leanstate")
