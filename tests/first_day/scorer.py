"""Somebody's own scorer: `--task scorer:right`."""


def right(answer, record):
    """An answer is right when it is the row's letter."""
    return answer.strip() == record["text_output"].strip()
