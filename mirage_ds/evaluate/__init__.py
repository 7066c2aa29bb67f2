"""Decoding a model and scoring its answers.

decoder     a model folder, or records and prompts → answers
scoring     answers → the scorer's metrics; which of two scores is the better one
report      a file of records → answers and scores, on one process or several ranks
tables      files of scores, and scores as tables
harness     what lmms-eval and VLMEvalKit wrote → a file of scores
lmms        the model `mirage` of lmms-eval
model_card  scores → the model card
spec        the flags
command     `mirage-ds evaluate` and `mirage-ds generate`
"""
