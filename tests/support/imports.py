"""What ranks import, done once in the server that they are forked from (support/group.py)."""

from __future__ import annotations

import gc

import deepspeed  # noqa: F401
import networkx  # noqa: F401
import pandas  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
import transformers.models.qwen2_vl.image_processing_pil_qwen2_vl  # noqa: F401

import mirage_ds.train  # noqa: F401

# DeepSpeed collects garbage in every start and step. What is imported is none, and need not be looked at each time.
gc.collect()
gc.freeze()
