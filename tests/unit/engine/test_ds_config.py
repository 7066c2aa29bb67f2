"""The DeepSpeed JSON: what ships works, what DeepSpeed would ignore is refused, contradictions name both sides."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import config as theirs

from mirage_ds.config.run import RunConfig
from mirage_ds.engine.ds_config import (
    KEEPS_ALL,
    KEYS,
    compute_dtype,
    default_path,
    fill_limits,
    read_json,
    recipes,
    resolve,
    shipped_folder,
    zero_stage,
)
from mirage_ds.engine.setup import check_ds_config
from mirage_ds.errors import UserError

SHIPPED = recipes()
each_recipe = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
HERE = Path("ds.json")


def run_config(**settings: Any) -> RunConfig:
    return RunConfig(**(dict(model="m", stage="stage2", data_path="d", save_model_path="o") | settings))


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], dict[str, Any]]:
    """Read a JSON given as a value or as text."""

    def call(content: Any) -> dict[str, Any]:
        file = tmp_path / "ds.json"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_json(file)

    return call


@pytest.fixture
def refused(read: Callable[[Any], dict[str, Any]], tmp_path: Path) -> Callable[..., str]:
    """The one sentence with which a JSON is refused, when it is read or when it meets the run's settings."""

    def call(content: Any, **settings: Any) -> str:
        def prepare() -> None:
            values = read(content)
            compute_dtype(values), zero_stage(values)
            resolve(values, tmp_path / "ds.json", run_config(**settings), 2)

        with pytest.raises(UserError) as caught:
            prepare()
        said = str(caught.value)
        assert said.startswith(str(tmp_path / "ds.json"))
        assert "\n" not in said
        return said

    return call


def test_every_stage_has_a_recipe() -> None:
    assert 6 <= len(SHIPPED) <= 12
    assert {default_path(stage) for stage in ("sft", "stage1", "stage2")} < set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "dropped", "zero", "more"),
    [
        ("zero3", ("bf16", "data_types"), {"overlap_comm": False, "stage3_param_persistence_threshold": 0}, {}),
        ("zero3_kept_bf16_states", (), {"overlap_comm": False}, {}),
        ("zero2", ("bf16", "data_types"), {"overlap_comm": False}, {}),
        (
            "zero3_offload",
            ("bf16", "data_types"),
            {
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
                "offload_param": {"device": "cpu", "pin_memory": False},
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
            },
            {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
        ),
    ],
)
def test_a_cpu_runs_a_recipe_in_float32_sharded_and_without_a_compiler(
    name: str, dropped: tuple[str, ...], zero: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    path = shipped_folder() / f"{name}.json"
    values = json.loads(path.read_text())
    wanted = {key: value for key, value in values.items() if key not in dropped} | more
    wanted["zero_optimization"] = values["zero_optimization"] | zero
    assert read_json(path, "cpu") == wanted
    assert read_json(path) == read_json(path, "cuda") == values
    # Wherever the recipe lies; a user's own JSON says what the user wants.
    copied, own, changed = tmp_path / "clone" / path.name, tmp_path / "own.json", tmp_path / path.name
    copied.parent.mkdir()
    copied.write_text(path.read_text())
    own.write_text(path.read_text())
    other = values | {"steps_per_print": 7}
    changed.write_text(json.dumps(other))
    assert read_json(copied, "cpu") == wanted
    assert read_json(own, "cpu") == values
    assert read_json(changed, "cpu") == other


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@each_recipe
def test_every_recipe_resolves_to_what_deepspeed_then_reads(path: Path, device: str) -> None:
    values = read_json(path, device)
    before = copy.deepcopy(values)
    settings = dict(
        learning_rate=3e-4, adam_beta1=0.8, adam_beta2=0.97, adam_eps=1e-6, weight_decay=0.2, max_grad_norm=0.7
    )
    resolved = resolve(values, path, run_config(global_batch_size=16, **settings), 4)
    assert values == before
    assert resolved["train_batch_size"] == 4
    made = theirs.DeepSpeedConfig(resolve(values, path, run_config(global_batch_size=16, **settings), 1))
    assert (made.train_batch_size, made.train_micro_batch_size_per_gpu, made.gradient_accumulation_steps) == (1, 1, 1)
    assert made.gradient_clipping == 0.7
    assert made.optimizer_name == "adamw"
    params = dict(made.optimizer_params)
    offloaded = made.zero_config.offload_optimizer is not None and made.zero_config.offload_optimizer.device != "none"
    # Runs on a CPU avoid a compiler.
    own_adam = offloaded and device != "cpu"
    assert params.pop("torch_adam") is not own_adam
    # DeepSpeed's own Adam is fused and has no such parameter.
    assert params.pop("fused", None) is (None if own_adam else True)
    assert params == {"lr": 3e-4, "betas": [0.8, 0.97], "eps": 1e-6, "weight_decay": 0.2}
    assert made.scheduler_name is None
    assert made.zero_optimization_stage == zero_stage(values)
    states = "bf16_states" in path.name
    in_fp32 = device == "cpu" and not states
    assert made.bfloat16_config.enabled is not in_fp32
    assert made.bfloat16_config.bf16_optimizer_states is states
    assert compute_dtype(values) == ("float32" if in_fp32 else "bfloat16")
    # bf16 without this accumulates gradients in bf16 (ZeRO-1 and 2) and loses small ones.
    assert in_fp32 or states or made.grad_accum_dtype == "fp32"


@each_recipe
def test_limits_left_to_the_model_are_filled(path: Path) -> None:
    values = resolve(read_json(path), path, run_config(), 2)
    zero = dict(values["zero_optimization"])
    fill_limits(values, 12_345)
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        assert values["zero_optimization"].get(key) == (12_345 if zero.get(key) == "auto" else zero.get(key))
    made = theirs.DeepSpeedConfig(resolve(read_json(path), path, run_config(), 1)).zero_config
    # DeepSpeed alone reads the file too, with a default of its own.
    assert made.max_live_parameters in (10**9, 10**12)
    fill_limits({}, 1)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_recurrent_stage_keeps_its_parameters_from_step_to_step(device: str) -> None:
    zero = read_json(default_path("stage2"), device)["zero_optimization"]
    # More than any matrix has: never released, also on a CPU.
    assert zero["stage3_param_persistence_threshold"] == KEEPS_ALL
    # With a reuse distance DeepSpeed would walk the rest of its trace at each release.
    assert zero["stage3_max_reuse_distance"] == 0


def test_a_missing_json_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError) as caught:
        read_json(Path("gone.json"))
    assert str(caught.value).startswith("--deepspeed gone.json: no such file")
    assert all(path.name in str(caught.value) for path in SHIPPED)


def test_an_unknown_key_is_refused_with_a_suggestion(refused: Callable[..., str]) -> None:
    said = refused({"zero_optimisation": {"stage": 3}})
    assert "no key 'zero_optimisation' and would ignore it (did you mean 'zero_optimization'?)" in said
    assert "did you mean" not in refused({"qqqq": 1})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"bf16": {"enabled": true}, "bf16": {}}', "key 'bf16' stands there twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "key 'stage' stands there twice"),
        ('{"bf16": \n', "line 2 column 1 (char 10)"),
        ('{"bf16": {"enabled": True}}', "line 1 column"),
        ("[1]", "expected an object, found list"),
        (b'{"tensorboard": {"job_name": "caf\xe9"}}', "utf-8"),
    ],
    ids=["twice", "twice below", "cut off", "python", "list", "latin-1"],
)
def test_a_broken_json_says_where(text: str | bytes, part: str, refused: Callable[..., str]) -> None:
    assert part in refused(text)


@pytest.mark.parametrize(
    "values",
    [
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
        {"bf16": {"enabled": "auto"}},
        {"steps_per_print": "auto"},
        {"optimizer": {"type": "AdamW", "params": {"torch_adam": "auto"}}},
    ],
)
def test_auto_is_refused_where_nobody_fills_it(values: dict[str, Any], refused: Callable[..., str]) -> None:
    assert '"auto"' in refused(values)


def test_auto_is_filled_where_the_run_says_the_value(read: Callable[[Any], dict[str, Any]]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    values = read(dict.fromkeys(names, "auto") | {"optimizer": {"type": "AdamW", "params": params}})
    assert resolve(values, HERE, run_config(), 2) == resolve({}, HERE, run_config(), 2)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"train_batch_size": 32}, ["'train_batch_size' is 32", "8 rows", "--global_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["'train_micro_batch_size_per_gpu' is 4", "--micro_batch_tokens"]),
        ({"gradient_accumulation_steps": 2}, ["'gradient_accumulation_steps' is 2", "--micro_batch_tokens"]),
        ({"gradient_clipping": 0.5}, ["'gradient_clipping' is 0.5", "--max_grad_norm is 1.0"]),
        ({"lr": 1e-4}, ["'lr' is 0.0001", "--learning_rate is 1e-05"]),
        ({"betas": [0.9, 0.999]}, ["'betas' is [0.9, 0.999]", "--adam_beta1/--adam_beta2 is [0.9, 0.95]"]),
        ({"eps": 1e-6}, ["'eps' is 1e-06", "--adam_eps is 1e-08"]),
        ({"weight_decay": 0.1}, ["'weight_decay' is 0.1", "--weight_decay is 0.01"]),
    ],
)
def test_a_contradiction_names_both_sides(
    values: dict[str, Any], parts: list[str], refused: Callable[..., str]
) -> None:
    if not values.keys() & set(KEYS["known"]):
        values = {"optimizer": {"type": "AdamW", "params": values}}
    said = refused(values)
    assert all(part in said for part in parts), said


def test_what_agrees_with_the_run_may_stand_in_the_json(read: Callable[[Any], dict[str, Any]]) -> None:
    params = {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}
    values = {"train_batch_size": 24, "gradient_clipping": 1, "optimizer": {"type": "Adam", "params": params}}
    made = resolve(read(values), HERE, run_config(global_batch_size=24), 3)
    assert made == resolve({}, HERE, run_config(global_batch_size=24), 3)
    assert made["train_batch_size"] == 3


def test_scheduler_fp16_and_other_optimizers_are_refused(refused: Callable[..., str]) -> None:
    assert "--lr_scheduler" in refused({"scheduler": {"type": "WarmupLR", "params": {}}})
    assert "use 'bf16'" in refused({"fp16": {"enabled": True}})
    assert "'Lion'" in refused({"optimizer": {"type": "Lion"}})


@pytest.mark.parametrize("key", ["bfloat16", "sequence_parallel_size"])
def test_a_key_that_would_work_against_the_trainer_is_refused_for_what_it_does(
    key: str, refused: Callable[..., str]
) -> None:
    """`bfloat16` is `bf16` by its old name, beside which float32 weights would load; the other divides the ranks."""
    said = refused({key: {"enabled": True}})
    assert f"'{key}'" in said
    assert "would ignore" not in said


def test_fp16_switched_off_is_no_fault(read: Callable[[Any], dict[str, Any]]) -> None:
    assert read({"fp16": {"enabled": False}, "bf16": {"enabled": True}})["bf16"]["enabled"]


@pytest.mark.parametrize(
    "values",
    [
        {"bf16": True},
        {"fp16": True},
        {"zero_optimization": 3},
        {"zero_optimization": {"stage": "three"}},
        {"zero_optimization": {"offload_optimizer": "cpu"}},
        {"optimizer": "AdamW"},
        {"optimizer": {"type": "AdamW", "params": [1e-5]}},
    ],
    ids=json.dumps,
)
def test_a_block_of_the_wrong_type_is_one_sentence(values: dict[str, Any], refused: Callable[..., str]) -> None:
    refused(values)


def test_torchs_adam_runs_unless_the_step_is_offloaded_or_the_json_says_otherwise() -> None:
    def chosen(zero: dict[str, Any], **params: Any) -> bool:
        values = {"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": params}}
        return bool(resolve(values, HERE, run_config(), 1)["optimizer"]["params"]["torch_adam"])

    assert chosen({"stage": 3})
    assert chosen({"stage": 3, "offload_optimizer": {"device": "none"}})
    assert chosen({"stage": 3, "offload_optimizer": None})
    assert not chosen({"stage": 3, "offload_optimizer": {"device": "cpu"}})
    assert chosen({"stage": 3, "offload_optimizer": {"device": "cpu"}}, torch_adam=True)
    assert not chosen({"stage": 3}, torch_adam=False)


@pytest.mark.parametrize(("said", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, False)])
def test_adamw_is_fused_unless_the_json_says_otherwise(said: dict, fused: bool) -> None:
    values = {"optimizer": {"type": "AdamW", "params": said}}
    params = resolve(values, HERE, run_config(), 1)["optimizer"]["params"]
    assert params["fused"] is fused
    # What torch takes together.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], **{k: v for k, v in params.items() if k != "torch_adam"})


class Recorder(dict[str, Any]):
    """A configuration that notes every top-level key it is asked for."""

    asked: set[str] = set()  # noqa: RUF012  # shared on purpose: DeepSpeed works on copies

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """The top-level keys that the installed DeepSpeed's configuration asks for."""
    Recorder.asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        # As in a started process group, where it also looks for sequence_parallel_size.
        patch.setattr(theirs.dist, "get_rank", lambda: 0)
        patch.setattr(theirs.dist, "get_world_size", lambda: 1)
        theirs.DeepSpeedConfig(Recorder(train_batch_size=1))
    return Recorder.asked - theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()


def test_the_known_keys_are_those_that_the_installed_deepspeed_reads(asked: set[str]) -> None:
    assert {"zero_optimization", "bf16", "compile", "data_types", "torch_autocast"} <= asked
    assert sorted(asked - set(KEYS["known"])) == []
    assert sorted(set(KEYS["known"]) - asked) == []


@pytest.mark.parametrize("key", sorted(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS))
def test_what_deepspeed_has_removed_is_refused_before_it_starts(key: str, refused: Callable[..., str]) -> None:
    assert f"'{key}'" in refused({key: {}})


ON: dict[str, Any] = {
    "gradient_predivide_factor": 4.0,
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": False,
    "zero_optimization.compute_grad_norm": False,
    "tensor_parallel": {"autotp_size": 2},
    "compile": {"deepcompile": True},
    "disable_allgather": True,
}
OFF: dict[str, Any] = {
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.mics_shard_size": -1,
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "data_efficiency": {"enabled": False, "seed": 7},
}


def _placed(name: str, value: Any) -> dict[str, Any]:
    block, _, key = name.rpartition(".")
    return {block: {key: value}} if block else {key: value}


@pytest.mark.parametrize("name", KEYS["unused"])
def test_what_this_trainer_does_not_use_is_refused_and_switched_off_it_is_no_fault(
    name: str, refused: Callable[..., str], read: Callable[[Any], dict[str, Any]]
) -> None:
    on = ON.get(name, {KEYS["unused"][name].get("switch", "anything"): True})
    assert f": '{name}' is not supported: " in refused(_placed(name, on))
    values = _placed(name, OFF.get(name, {}))
    assert read(values) == values


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "'zero_optimization.offload_param' needs 'stage' 3"),
        ({"offload_optimizer": {"device": "cpu"}}, "'zero_optimization.offload_optimizer' needs 'stage' 1 or more"),
        (
            {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/disk"}},
            "'zero_optimization.offload_param' is on NVMe, and DeepSpeed can neither save nor restore such a run",
        ),
    ],
)
def test_an_offload_that_deepspeed_would_ignore_is_refused(
    zero: dict[str, Any], said: str, refused: Callable[..., str], read: Callable[[Any], dict[str, Any]]
) -> None:
    assert said in refused({"zero_optimization": zero})
    assert read({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}, "offload_param": None}})


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"zero_optimization": {"stage": 3, "reuse": 1}}, "'reuse' (block Zero)"),
        (
            {"zero_optimization": {"offload_param": {"device": "moon"}}},
            "'offload_param.device' (block Zero) with 'moon'",
        ),
        ({"bf16": {"enabled": "banana"}}, "'enabled' (block BF16) with 'banana'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "the block Zero"),
        ({"checkpoint": {"tag_validation": "x"}}, "cannot read it (DeepSpeedConfigError"),
        ({"aio": "banana"}, "cannot read it"),
        ({"comms_logger": 5}, "cannot read it"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS ZeRO-3 sharding has been removed"),
        ({"communication_data_type": "fp17"}, "cannot read it (Invalid communication_data_type"),
    ],
)
def test_values_that_deepspeed_refuses_are_one_sentence(block: dict[str, Any], said: str) -> None:
    values = resolve(block, HERE, run_config(), 1)
    with pytest.raises(UserError) as caught:
        check_ds_config(values, HERE)
    assert str(caught.value).startswith("ds.json: DeepSpeed ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@each_recipe
def test_what_ships_is_not_refused(path: Path) -> None:
    check_ds_config(resolve(read_json(path), path, run_config(), 1), path)


def test_unknown_optimizer_parameters_are_refused_before_torch_does(refused: Callable[..., str]) -> None:
    said = refused({"optimizer": {"type": "AdamW", "params": {"weight_decai": 0.1}}})
    assert "no parameter 'weight_decai' (did you mean 'weight_decay'?)" in said
    said = refused({"optimizer": {"type": "AdamW", "params": {"torch_adam": "yes"}}})
    assert "'optimizer.params.torch_adam' is 'yes'; write true or false" in said


def test_dtypes_that_cannot_be_are_refused(refused: Callable[..., str]) -> None:
    said = refused({"torch_autocast": {"enabled": True}})
    assert "'torch_autocast.dtype' is None; write \"bfloat16\"" in said
    assert "'float16'" in refused({"torch_autocast": {"enabled": True, "dtype": "float16"}})
    said = refused({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": True}})
    assert "both enabled; keep one" in said
    masters = {"enabled": True, "bf16_master_weights_and_grads": True}
    assert "needs 'offload_optimizer'" in refused({"bf16": masters, "zero_optimization": {"stage": 3}})
    assert "write an object" in refused({"torch_autocast": True})
