"""Replacement controls: does the answer depend on the latents?

    statistics   paired differences: bootstrap, exact McNemar, Holm
    gaussian     a normal distribution estimated from few vectors
    names        the conditions by name
    spec         the flags of `mirage-ds controls`
    conditions   what is fed at the slots, condition by condition
    bench        a model with its encoder: rows, prompts, decoding
    teach        the likelihood of a given answer behind given latents
    run          every record under every condition
    paths        one input, the latents of one path or of another
    report       tables, JSON, Markdown
    study        from a model folder and a records file to the whole report
    compare      paired tests between result files
    command      `mirage-ds controls` and `mirage-ds compare`

A user of the stations, never used by them. What a result says stands in docs/controls.md.
"""
