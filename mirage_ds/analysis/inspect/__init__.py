"""Seeing the latents: heat maps, nearest words, attention, PCA and a linear probe, as pictures and one page.

    look     a row through the model → its latents, what attends to them, all numbers and figures of a latent block
    measure  numbers about vectors: cosines, nearest words, pooled targets, principal components
    probe    what a linear reader finds in them, and in one sentence
    draw     numbers → matplotlib figures
    style    sizes, colours, legends and texts of all figures (captions.yaml says how to read them)
    page     figures and tables → one HTML file (page.html)
    study    what `mirage-ds inspect` does: chosen rows, and all rows of a file together
    command  its flags and the command

It uses the stations of the trainer; none of them uses it.
"""
