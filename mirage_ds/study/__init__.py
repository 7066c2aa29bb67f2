"""Studies: one file describes the runs, the cluster runs them, one command reports them."""
