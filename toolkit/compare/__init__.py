"""Methods side by side: one plan of training runs, made one after the other, and one report of them."""
