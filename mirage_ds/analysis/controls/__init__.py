"""Replacement controls: does the answer depend on the latents?

    statistics   paired differences: bootstrap, exact McNemar, Holm
    spec         the conditions by name, and the flags of `mirage-ds controls`
    conditions   what is fed at the slots, condition by condition
    teach        rows, and the likelihood of their answers behind given latents
    run          every record under every condition
    paths        one input, the latents of one path or of another
    report       tables and sentences
    study        from a model folder and a records file to the whole report
    compare      paired tests between result files
    command      `mirage-ds controls` and `mirage-ds compare`

A user of the stations, never used by them. What a result says stands in docs/controls.md.
"""
