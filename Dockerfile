# A machine for runs: docker build -t leanstate .  and  docker run --gpus all --shm-size 8g -v $PWD:/work leanstate train ...
# The base has CUDA's compiler and headers, for the compiled optimizer step and DeepSpeed's extensions.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/leanstate
ENV PATH=/opt/leanstate/bin:$PATH

# torch comes first: DeepSpeed's build imports it.
WORKDIR /opt/source
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch setuptools wheel hatchling
COPY pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY toolkit toolkit
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt .

WORKDIR /work
ENTRYPOINT ["toolkit"]
CMD ["doctor"]
