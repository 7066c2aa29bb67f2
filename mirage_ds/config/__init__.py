"""The settings of a run, and the flags that are made from them."""
