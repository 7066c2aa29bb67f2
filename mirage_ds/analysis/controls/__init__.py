"""Replacement controls: does the answer depend on the latents?

    statistics   paired differences: bootstrap, exact McNemar, Holm; in one sentence, with what could not be seen
    spec         the conditions by name, and the flags of `mirage-ds controls`
    conditions   what is fed at the slots, condition by condition
    bank         own latents in a folder, which a server feeds other questions
    teach        rows, batch by batch, and the likelihood of their answers behind given latents
    paths        one input, the latents of one path or of another
    report       tables and sentences of the controls, and of a comparison of result files
    run          every record under every condition, from a model folder and a records file to the whole report
    command      `mirage-ds controls` and `mirage-ds compare`

A user of the stations, never used by them. What a result says stands in docs/controls.md.
"""
