"""The same runs on a GPU: they train, agree with the CPU, and say what memory they took."""

from __future__ import annotations

import io
import itertools
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner
from tuner.build import load_base
from tuner.config.folder import options_of
from tuner.models.family import FAMILIES

pytestmark = pytest.mark.gpu

TINY = ("model=tiny", "logger=none", "train.max_steps=6", "train.num_samples=1", "train.max_new_tokens=8")


def losses(out: Path, *words: str) -> tuple[list[float], Any]:
    from tuner.logging.disk import read_metrics

    summary = tuner.run(tuner.compose([*TINY, *words, f"out={out}"]))
    return [row.metrics["train/loss"] for row in read_metrics(out) if "train/loss" in row.metrics], summary


OFF = {"fp32": 1e-3, "bf16": 3e-2, "bf16_stochastic": 3e-2, "amp_bf16": 3e-2, "amp_fp16": 1e-2}
"""Of the loss of six steps: another order of sums in fp32 (TF32 is off by default); 8 bits of mantissa in bf16, 11 in
fp16."""


@pytest.mark.parametrize("peft", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", OFF)
def test_a_run_on_the_gpu_follows_the_run_on_the_cpu(peft: str, precision: str, tmp_path: Path) -> None:
    words = (f"peft={peft}", f"precision={precision}")
    on_gpu, summary = losses(tmp_path / "gpu", *words, "device=cuda")
    on_cpu, _ = losses(tmp_path / "cpu", *words, "device=cpu")
    assert on_gpu == pytest.approx(on_cpu, rel=OFF[precision])
    assert summary.precision == precision
    assert summary.device.startswith("cuda")
    assert summary.peak_memory_mib == pytest.approx(torch.cuda.max_memory_allocated() / 2**20)


def test_a_scale_that_is_too_large_on_the_gpu_falls_until_steps_are_taken(tmp_path: Path) -> None:
    from tuner.logging.disk import read_metrics

    words = ("precision=amp_fp16", "precision.initial_loss_scale=16777216", "precision.growth_interval=3")
    _, summary = losses(tmp_path / "run", "peft=full", *words, "train.max_steps=16", "device=cuda")
    lines = [row.metrics for row in read_metrics(tmp_path / "run")]
    scales = [metrics["train/loss_scale"] for metrics in lines if "train/loss" in metrics]
    assert summary.status == "finished"
    assert 1 <= summary.skipped_steps < 12
    assert scales[0] == 2.0**24
    assert min(scales) < 2.0**24
    assert all(later in (earlier, earlier / 2, earlier * 2) for earlier, later in itertools.pairwise(scales))
    assert summary.val_loss < summary.val_loss_before


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "pure"])
def test_gradients_in_16_bits_are_those_in_fp32_to_rounding(dtype: str, unit: float, mixed: bool) -> None:
    """Relative norm of all gradients together: some ten roundings of half an ulp each; on a CPU 4 to 7 of them."""
    from tuner.build import compute_in
    from tuner.loop import add_gradients
    from tuner.types import Batch, Precision

    tokens = torch.randint(0, 352, (4, 40), generator=torch.Generator().manual_seed(3))
    batch, scale, found = Batch(tokens, tokens).to(torch.device("cuda")), 1024.0, []
    for precision in (Precision("x", "float32"), Precision("x", dtype, weights="float32" if mixed else None)):
        config = FAMILIES["llama"].from_hugging_face(SHAPE, None)
        model = load_base(config, getattr(torch, precision.held), torch.device("cuda"), seed=1)
        compute_in(model, precision)
        add_gradients(model.requires_grad_(True).train(), [batch], scale)
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {getattr(torch, precision.held)}
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
    exact, rounded = found
    assert unit / 2 < (rounded - exact).norm() / exact.norm() < 12 * unit


def test_stochastic_rounding_draws_the_same_on_both_devices() -> None:
    from tuner.precision.stochastic_rounding import round_stochastically

    exact = torch.randn(300_001, generator=torch.Generator().manual_seed(2))
    found = []
    for device in ("cpu", "cuda"):
        out = torch.empty(exact.shape, dtype=torch.bfloat16, device=device)
        round_stochastically(exact.to(device, copy=True), 77, out)
        found.append(out.cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_rows_on_the_gpu_follow_those_on_the_cpu(precision: str, tmp_path: Path) -> None:
    words = ("data.packing=pack", f"precision={precision}")
    on_gpu, _ = losses(tmp_path / "gpu", *words, "device=cuda")
    on_cpu, _ = losses(tmp_path / "cpu", *words, "device=cpu")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("window", [None, 2, 7])
@pytest.mark.parametrize(("heads", "head_dim"), [(6, 64), (2, 256), (6, 16)])
def test_the_kernel_for_texts_of_varying_length_equals_attention_in_buckets(
    window: int | None, heads: int, head_dim: int
) -> None:
    """Outputs and gradients in bf16, where both are as far from fp32."""
    from tuner.models.attention import Scoring, attention_for
    from tuner.models.buckets import Buckets
    from tuner.models.documents import Documents, Varlen

    cuda, lengths = torch.device("cuda"), [[60, 1, 130], [200], [7, 7, 150, 20]]
    documents, scoring = Documents(lengths, (3, 200), cuda), Scoring(head_dim**-0.5)
    assert isinstance(documents.visible(window, torch.bfloat16, scoring, head_dim), Varlen)
    torch.manual_seed(0)
    leaves = [torch.randn(3, 200, count, head_dim, device=cuda) for count in (heads, 2, 2)]
    real = torch.tensor([[place < sum(row) for place in range(200)] for row in lengths], device=cuda)
    found: dict[str, list[torch.Tensor]] = {}
    for name, kind, dtype in (
        ("exact", Buckets, torch.float32),
        ("buckets", Buckets, torch.bfloat16),
        ("varlen", Varlen, torch.bfloat16),
    ):
        inputs = [leaf.to(dtype).detach().requires_grad_() for leaf in leaves]
        out = kind(documents, window).attend(*(x.transpose(1, 2) for x in inputs), scoring, attention_for("cuda"))
        texts = out.transpose(1, 2)[real]
        (texts * torch.linspace(-1, 1, texts.numel(), device=cuda).view_as(texts)).sum().backward()
        found[name] = [texts.detach().float(), *(x.grad.float() for x in inputs if x.grad is not None)]
    for exact, buckets, varlen in zip(*found.values(), strict=True):
        assert (varlen - exact).norm() <= 1.5 * (buckets - exact).norm() + 1e-3 * exact.norm()
        assert (varlen - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_new_tokens_train_on_the_gpu_and_twice_alike(precision: str, tmp_path: Path) -> None:
    words = ("model.add_tokens=['def ','self']", f"precision={precision}")
    on_gpu, _ = losses(tmp_path / "gpu", *words, "device=cuda")
    again, _ = losses(tmp_path / "again", *words, "device=cuda")
    on_cpu, _ = losses(tmp_path / "cpu", *words, "device=cpu")
    assert on_gpu == again
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("optimizer", sorted(options_of("optimizer") - {"custom"}))
def test_every_optimizer_trains_on_the_gpu(optimizer: str, tmp_path: Path) -> None:
    rate = "optimizer.lr=0.001" if "lion" in optimizer else "optimizer.lr=0.01"
    before_and_after, summary = losses(tmp_path / "run", f"optimizer={optimizer}", rate, "device=cuda")
    assert before_and_after[-1] < before_and_after[0]
    assert summary.status == "finished"


@pytest.mark.parametrize(
    "name", ["PagedAdamW", "PagedAdamW8bit", "PagedLion8bit", "PagedAdEMAMix", "PagedAdEMAMix8bit"]
)
def test_state_is_paged_again_after_a_resume(name: str) -> None:
    from tuner.optimizers.custom import custom
    from tuner.optimizers.groups import Trained

    def stepped(optimizer: Any, parameter: torch.nn.Parameter, seeds: range) -> torch.Tensor:
        for seed in seeds:
            generator = torch.Generator("cuda").manual_seed(seed)
            parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
            optimizer.step()
        return parameter.detach().clone()

    start = torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    first, second = (
        custom(f"bitsandbytes.optim.{name}", [Trained("weight", p, "matrices")], {"lr": 1e-3}, []) for p in parameters
    )
    parameters[1].data.copy_(stepped(first, parameters[0], range(3)))
    saved = {**first.state_dict()}
    second.load_state_dict(torch.load(_file_of(saved), weights_only=True, map_location="cpu"))
    (state,) = second.state.values()
    assert all(state[moment].is_paged for moment in ("state1", "state2") if moment in state)
    assert torch.equal(stepped(first, parameters[0], range(3, 6)), stepped(second, parameters[1], range(3, 6)))


def _file_of(content: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return buffer


def test_nf4_bytes_on_the_gpu_equal_bitsandbytes(tmp_path: Path) -> None:
    from tuner.quantization.nf4 import NF4Linear
    from tuner.quiet import import_bitsandbytes

    functional = import_bitsandbytes().functional
    dense = torch.nn.Linear(192, 500, bias=False, dtype=torch.bfloat16, device="cuda")
    ours = NF4Linear.from_linear(dense, block_size=64, double_quant=True)
    packed, state = functional.quantize_4bit(dense.weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    torch.testing.assert_close(ours.weight, packed.flatten(), rtol=0, atol=0)
    torch.testing.assert_close(ours.dense_weight(), functional.dequantize_4bit(packed, state), rtol=0, atol=0)


def test_a_run_on_the_gpu_continues_after_a_stop(tmp_path: Path) -> None:
    whole, _ = losses(tmp_path / "whole", "device=cuda")
    losses(tmp_path / "parts", "device=cuda", "train.max_steps=3", "schedule=constant")
    more, _ = losses(tmp_path / "parts", "device=cuda", "schedule=constant")
    assert len(more) == len(whole) == 6


def command(out: Path, *words: str) -> subprocess.Popen[str]:
    """A run in a process of its own: what cuBLAS computes with is settled when CUDA starts."""
    steps = ("train.max_steps=40", "checkpoint.every_steps=5", "train.val_every_steps=10", "train.deterministic=true")
    line = [sys.executable, "-m", "tuner", *TINY, *steps, "device=cuda", *words, f"out={out}"]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def bits_of(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Every number that is no measurement of time or memory, and the weights that the run left."""
    from tuner.logging.disk import read_metrics

    measured = ("perf/tokens_per_s", "memory/peak_mib")
    numbers = [
        {"step": row.step, **{name: value for name, value in row.metrics.items() if name not in measured}}
        for row in read_metrics(out)
    ]
    files = [file for folder in ("adapter", "model") for file in sorted((out / folder).glob("*.safetensors"))]
    return numbers, {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "words",
    [
        ("peft=lora", "precision=fp32", "peft.lora_dropout=0.1"),
        ("peft=qlora", "precision=bf16", "peft.lora_dropout=0.1"),
        ("peft=full", "precision=fp32"),
        ("peft=full", "precision=bf16", "data.packing=pack", "optimizer=adamw8bit"),
        ("peft=full", "precision=amp_fp16", "precision.initial_loss_scale=16777216", "precision.growth_interval=4"),
        ("peft=full", "precision=bf16_stochastic"),
    ],
    ids=["lora", "qlora", "full", "packed", "scaled", "stochastic"],
)
def test_a_killed_run_is_continued_bit_for_bit_under_deterministic(words: tuple[str, ...], tmp_path: Path) -> None:
    ended(command(tmp_path / "whole", *words))
    killed = command(tmp_path / "killed", *words)
    lines, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not (lines.exists() and '"step": 12,' in lines.read_text()):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert "resumed at step " in ended(command(tmp_path / "killed", *words))
    numbers, weights = bits_of(tmp_path / "killed")
    expected_numbers, expected_weights = bits_of(tmp_path / "whole")
    assert numbers == expected_numbers
    assert weights.keys() == expected_weights.keys()
    assert len(weights) > 4
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected_weights.items())


def test_deterministic_is_refused_where_cuda_was_started_without_it(tmp_path: Path) -> None:
    code = """
        import os, torch, tuner
        from tuner.errors import ConfigError
        words = ["model=tiny", "logger=none", "train.max_steps=1", "train.num_samples=0", "device=cuda"]
        def run(name, *more):
            return tuner.run(tuner.compose([*words, *more, f"out={name}"])).status
        if FIRST:
            torch.zeros(1, device="cuda")
            try:
                run("refused", "train.deterministic=true")
            except ConfigError as error:
                print(error)
            assert not os.path.exists("refused")
        else:
            for name in ("one", "two"):  # the second finds CUDA started, as the first wanted it
                print(run(name, "train.deterministic=true"))
            print(run("three"))
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        assert not torch.are_deterministic_algorithms_enabled()
    """
    for first, said in ((True, "train.deterministic=true: CUDA was started"), (False, "finished")):
        script = f"FIRST = {first}\n{textwrap.dedent(code)}"
        line = [sys.executable, "-c", script]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


SHAPE: dict[str, Any] = {
    "vocab_size": 352,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WINDOWS = {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_on_the_gpu_what_it_computes_on_the_cpu(family: str) -> None:
    """Whole rows and packed ones, logits and gradients."""
    config = replace(FAMILIES[family].from_hugging_face({**SHAPE, **WINDOWS}, None), random_weights=True)
    tokens = torch.randint(0, 352, (2, 60), generator=torch.Generator().manual_seed(0))
    documents = [[33, 27], [20, 1, 30]]
    found: dict[str, list[torch.Tensor]] = {}
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        model = load_base(config, torch.float32, device, seed=0).requires_grad_(True)
        whole, packed = model(tokens.to(device)), model(tokens.to(device), documents)
        (whole.square().mean() + packed.square().mean()).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found[name] = [tensor.detach().cpu() for tensor in (whole, packed, *gradients)]
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert (on_cpu - on_gpu).abs().max() <= 1e-4 * on_cpu.abs().max()  # another order of sums
