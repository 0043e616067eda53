"""Shared fixtures: small checkpoints, made once a session, and one thread, so that small work is fast anywhere."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest

from rlhfbench.measure.nvml import num_cuda_devices

# Triton decides as it is imported, which torch does, whether its own functions are compiled or interpreted. Without a
# GPU they are interpreted; the variable itself lives no longer than this, so nothing that a test starts inherits it.
with pytest.MonkeyPatch.context() as _patch, contextlib.suppress(ImportError):
    if num_cuda_devices() == 0:
        _patch.setenv("TRITON_INTERPRET", "1")
    import triton  # noqa: F401

# DeepSpeed, which other libraries import, looks for a device unless it is told, and prints that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from hypothesis import HealthCheck, settings
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)
from transformers.utils import logging

from rlhfkernels import Case, Options
from rlhfkernels.parallel.deepspeed import load
from rlhfkernels.parallel.world import World, join_world, leave_world

logging.disable_progress_bar()

# A shell lets what it starts in the background ignore Ctrl-C, which tests send to what they start themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and as long as a busy machine needs for one.
settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

_LONGEST_S = 300.0  # that a rank may take, on a busy machine


def _shape(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 48,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _configs(width: int) -> dict[str, Callable[[], object]]:
    """Configurations of 2 layers and 4 heads by architecture; with initial weights wide enough for logits to differ."""
    shape = _shape(width)
    gated = {**shape, "intermediate_size": 2 * width, "initializer_range": 0.2}
    opt = {**shape, "ffn_dim": 2 * width, "word_embed_proj_dim": width, "init_std": 0.2}
    gpt2 = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48, "initializer_range": 0.2}
    return {
        "llama": lambda: LlamaConfig(**gated, num_key_value_heads=2),
        "opt": lambda: OPTConfig(**opt),
        "gpt_neox": lambda: GPTNeoXConfig(**gated),
        "gpt2": lambda: GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2),
        "mistral": lambda: MistralConfig(**gated, num_key_value_heads=2, sliding_window=6),
        "granite": lambda: GraniteConfig(**gated, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(**gated, num_key_value_heads=2, tie_word_embeddings=True),
    }


# ``wide-`` ones have heads of 32, as large models nearly have: what stands beside a head's own size is small there.
# ``small-reward`` has another width and depth, and the same vocabulary; the others are no reward models for the rest.
_SMALL = {"num_hidden_layers": 1, "intermediate_size": 24}
_REWARDS: dict[str, Callable[[], object]] = {
    "small-reward": lambda: LlamaConfig(**_shape(16) | _SMALL),
    "other-words": lambda: LlamaConfig(**_shape(16) | _SMALL | {"vocab_size": 50}),
    "short-reward": lambda: LlamaConfig(**_shape(16) | _SMALL | {"max_position_embeddings": 8}),
    "bytes": lambda: LlamaConfig(**_shape(32) | {"intermediate_size": 64, "vocab_size": 256}),  # for text
}
# Architectures in which something differs from Llama that a wrong forward pass would miss.
_GATED = {**_shape(32), "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
_NEOX = {**_shape(32), "intermediate_size": 64, "initializer_range": 0.2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48, "initializer_range": 0.2}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
_OTHERS: dict[str, dict[str, object]] = {
    "gemma2": {**_GATED, "head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        **_GATED,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gptj": {**_GPT, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 48,
        "initializer_range": 0.2,
        "hidden_dropout": 0.3,
        "attention_dropout": 0.3,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 48, "max_seq_len": 64, "logit_scale": 0.5},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": 48,
        "max_seq_len": 64,
        "initializer_range": 0.2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "attn_pdrop": 0.3, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 48,
        "initializer_range": 0.2,
        "multi_query": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "cohere": {**_GATED, "logit_scale": 0.25},
    "hyperclovax": {**_GATED, "logits_scaling": 0.25},
    "mixtral": {**_GATED, "num_local_experts": 4, "router_jitter_noise": 0.3},
    "phimoe": {**_GATED, "num_local_experts": 4, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    "deepseek_v3": {
        **_GATED,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "phi3": {**_GATED, "original_max_position_embeddings": 16, "rope_parameters": _LONG},
    "bert-generation": {**_NEOX, "is_decoder": True},
    "two-way bert-generation": {**_NEOX, "is_decoder": False},
    "stray-window llama": {**_GATED, "sliding_window": 4},
    "dynamic gpt_neox": {**_NEOX, "rope_parameters": _DYNAMIC},
    "longrope gpt_neox": {**_NEOX, "rope_parameters": {**_LONG, "original_max_position_embeddings": 16}},
    "recurrent_gemma": {**_GATED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "xlstm": {"hidden_size": 32, "num_blocks": 2, "num_heads": 4, "vocab_size": 48},
    "falcon_h1": {**_GATED, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "lfm2": {**_GATED, "layer_types": ["conv", "full_attention"]},
    "gemma3": {
        "text_config": {**_GATED, "head_dim": 8},
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
}


def _config(name: str) -> object:
    return AutoConfig.for_model(name.split()[-1], **_OTHERS[name])


CONFIGS = (
    _REWARDS
    | _configs(32)
    | {name: functools.partial(_config, name) for name in _OTHERS}
    | {f"wide-{name}": make for name, make in _configs(128).items()}
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Whole files to the workers of ``-n``, in order: the tests of a file share fixtures and caches."""
    from xdist.scheduler import LoadFileScheduling  # here, as xdist is optional

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        """The tests of the evidence share a run of 90 s: its folder goes to one worker."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.rpartition("/")[0]
            return folder if folder.endswith("/evidence") else file

    config.option.loadscopereorder = False  # files with the fewest tests would come last, which are the longest
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a test that is skipped where changes are checked, unless no package would make it run."""
    return _expected((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fails a file that is skipped as a whole in the same way."""
    return _expected((yield))


_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)
# What a machine that checks changes need not have; ``.ci/run`` installs everything else.
_MAY_BE_MISSING = re.compile(r"\bCUDA\b|\bbitsandbytes\b")


def _expected(report: _Report) -> _Report:
    """The report, failed if it is of a skip that CI does not expect; an expected failure is a skip to pytest too."""
    if os.environ.get("CI") == "true" and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not _MAY_BE_MISSING.search(reason):
            report.outcome = "failed"
            report.longrepr = f"{reason}: skipped, and CI is true."
    return report


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a small float64 checkpoint of the named architecture, with biases that are not 0."""
    folders: dict[str, Path] = {}

    def make(architecture: str) -> str:
        if architecture not in folders:
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float64)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            folders[architecture] = tmp_path_factory.mktemp(architecture.replace(" ", "-"))
            model.save_pretrained(folders[architecture])
        return str(folders[architecture])

    return make


@pytest.fixture
def make_case(checkpoint: Callable[[str], str]) -> Callable[..., Case]:
    """A small float64 case; a keyword argument ``group__field`` is the option ``group.field``."""

    def make(method: str = "hydra", architecture: str = "llama", **changes: object) -> Case:
        fields = {"prompt_len": 5, "completion_len": 6, "batch_size": 4, "dtype": "float64"}
        options = {key.replace("__", "."): changes.pop(key) for key in list(changes) if "__" in key}
        fields |= changes
        return Case(
            method=method, model=checkpoint(architecture), **fields, options=Options.of({"lora.r": 3, **options})
        )

    return make


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with which fake tensors run on a CUDA device that is not there; loaded before torch."""
    compiler = shutil.which("g++")
    if compiler is None or torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("it needs g++ and torch's CPU build")
    library = tmp_path_factory.mktemp("fake-cuda") / "library.so"
    torch_folder = Path(torch.__file__).parent
    source = Path(__file__).parent / "kernels" / "training" / "fake_cuda" / "library.cpp"
    link = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
    files = [f"-I{torch_folder}/include", str(source), "-o", str(library)]
    subprocess.run([compiler, "-std=c++20", "-O0", "-shared", "-fPIC", *files, *link], check=True)
    return library


@pytest.fixture(scope="session")
def null_cuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds a CUDA device which computes nothing; see ``tests/null_cuda``."""
    compiler, packages = shutil.which("g++"), Path(torch.__file__).parents[1]
    # Triton's folder has what torch's headers of CUDA lack.
    headers = [packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include"]
    if compiler is None or not all(folder.is_dir() for folder in headers) or num_cuda_devices():
        pytest.skip("it needs g++, torch's build for CUDA 13 and no device")
    folder = tmp_path_factory.mktemp("null-cuda")
    sources = [str(path) for path in (Path(__file__).parent / "null_cuda").glob("*.cpp")]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *(f"-I{path}" for path in headers), *sources]
    subprocess.run([*command, "-o", str(folder / "null.so")], check=True)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (folder / name).symlink_to("null.so")
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "LD_PRELOAD": str(folder / "null.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "NULL_CUDA_STATE": str(folder / "processes"),
        "NULL_CUDA_LOG": str(folder / "log"),
        # It has no cuDNN.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }


@pytest.fixture(scope="module", autouse=True)
def _frozen_modules() -> None:
    """Hides what is imported from the garbage collector: a collection of it takes 0.2 s, and measurements have many."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets the interpreter free what is frozen: extension modules report it as leaked otherwise."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread a process, so that workers of ``-n`` side by side do not compete.

    What a test starts is no worker of xdist: pytest-benchmark would switch itself off there.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def imported_deepspeed() -> None:
    """Imports DeepSpeed before any rank is forked: each of them would take 5 s."""
    pytest.importorskip("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # which ``load`` sets
        load(torch.device("cpu"))


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Calls ``function(world, *arguments)`` on ``size`` ranks, and returns what each rank returned."""

    def call(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        _import_for_ranks()
        context = multiprocessing.get_context("fork")  # what is imported is there, and a test's own function too
        address = f"file://{tmp_path}/rendezvous-{len(list(tmp_path.iterdir()))}"
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_run, args=(World(rank, size), address, writer, function, arguments), daemon=True)
            for rank, (_, writer) in enumerate(pipes)
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            for process in processes:
                process.start()
        try:
            for _, writer in pipes:
                writer.close()
            return [_received(reader) for reader, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()

    return call


@functools.cache
def _import_for_ranks() -> None:
    """Imports what the strategies import when they are used: every rank would, and the compiler takes 2 s."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        for name in ("torch._dynamo", "torch.distributed.fsdp"):
            importlib.import_module(name)


def _received(reader: Connection) -> Any:
    assert reader.poll(_LONGEST_S), "a rank does not answer"
    result, problem = pickle.loads(reader.recv_bytes())
    assert problem is None, problem
    return result


def _run(world: World, address: str, writer: Connection, function: Callable[..., Any], arguments: Any) -> None:
    answer: tuple[Any, str | None]
    try:
        torch.set_num_threads(1)
        join_world(rank=world.rank, size=world.size, address=address, timeout_s=_LONGEST_S)
        answer = function(world, *arguments), None
        leave_world()
    except BaseException:
        answer = None, traceback.format_exc()
    writer.send_bytes(pickle.dumps(answer))
    os._exit(0)
