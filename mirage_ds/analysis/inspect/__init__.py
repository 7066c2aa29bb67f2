"""Seeing the latents: heat maps, nearest words, attention, PCA and a linear probe, as pictures and one page.

    run      a row through the model → its latents, what is fed back, what attends to them
    measure  numbers about vectors: cosines, nearest words, pooled targets, principal components
    look     all numbers of one latent block
    corpus   the latents of a file of records
    probe    what a linear reader finds in them
    draw     numbers → matplotlib figures
    style    sizes, colours, legends and texts of all figures
    page     figures and tables → one HTML file (page.html)
    live     figures of a few rows, for a run that is training
    study    what `mirage-ds inspect` does
    spec     its flags

It uses the stations of the trainer; none of them uses it.
"""
