import pytest

LONG = "x" * 300  # longer than a name may be

WRONG = [
    (("run", "--methods", "hydr"), "method 'hydr' is unknown: did you mean 'hydra'"),
    (("run", "--methods", "hydra,,lora"), "methods has '': it must be a name."),
    (("run", "--model", "tinny"), "model 'tinny' is unknown: did you mean 'tiny'?"),
    (("run", "--model", "./absent"), "model './absent' does not exist: there is no such folder or file."),
    (("run", "--model", "."), "model '.' is a folder that holds no model: it has no config.json."),
    (("run", "--device", "gpu"), "device 'gpu' is unknown"),
    (("run", "--dtype", "float23"), "dtype 'float23' is unknown: did you mean 'float32' or"),
    (("run", "--seq-lens", "0"), "seq_lens has 0: it must be an integer of at least 2."),
    (("run", "--seq-lens", "-8"), "seq_lens has -8: it must be an integer of at least 2."),
    (("run", "--seq-lens", "8,x"), "--seq-lens has 'x': it must list integers, joined by commas."),
    (("run", "--batch-sizes", ""), "--batch-sizes has '': it must list integers, joined by commas."),
    (("run", "--batch-sizes", "0"), "batch_sizes has 0: it must be an integer of at least 1."),
    (
        ("run", "--seq-lens", "9999"),
        "a length of 9999 (4999 + 5000) is too long for model 'tiny': it has 4096 positions.",
    ),
    (("run", "--lora-rank", "0"), "lora.r is 0: it must be an integer from 1 to 2147483647."),
    (("run", "--lora-rank", "x"), "--lora-rank is 'x': it must be an integer."),
    (("run", "--time-budget-s", "x"), "--time-budget-s is 'x': it must be a number."),
    (
        ("run", "--time-budget-s", "nan"),
        "time_budget_s is nan: it must be a finite number above 0 and at most 1000000.",
    ),
    (("run", "--seed", "-1"), "seed is -1: it must be an integer of at least 0 and below 9223372036854775808."),
    (("run", "--prompt-fraction", "2"), "prompt_fraction is 2.0: it must be a number between 0 and 1."),
    (("run", "--prompts", "absent.jsonl"), "prompts 'absent.jsonl' cannot be read: No such file or directory."),
    (("run", "--prompts", "bad.jsonl"), "prompts 'bad.jsonl', line 2: it is not JSON."),
    (("run", "--prompts", "empty.jsonl"), "prompts 'empty.jsonl' is empty"),
    (
        ("run", "--prompts", "good.jsonl", "--prompt-field", "q"),
        "line 1: there is no field 'q'; its fields are 'prompt'.",
    ),
    (("run", "--option", "ppo.gama=1"), "option 'ppo.gama' is unknown: did you mean 'ppo.gamma'"),
    (("run", "--option", "ppo.gamma"), "option 'ppo.gamma' has no value: write it as KEY=VALUE."),
    (("run", "--option", "ppo.gamma=2"), "ppo.gamma is 2.0: it must be a finite number from 0 to 1."),
    (("run", "--option", "gamma=1"), "option 'gamma' is now called 'ppo.gamma'."),
    (("run", "--sweep", "absent.toml"), "sweep file 'absent.toml' cannot be read: No such file or directory."),
    (("run", "--sweep", "typo.toml"), "sweep key 'metods' is unknown: did you mean 'methods'"),
    (("plan", "--gpu", "1KiB"), "gpu is '1KiB': it must be above 0.77 GiB, which CUDA itself takes."),
    (("run", "--time-budget-s", "0"), "time_budget_s is 0.0: it must be a finite number above 0 and at most 1000000."),
    (("run", "--memory-limit", "much"), "--memory-limit is 'much': it must be a size like 4GiB"),
    (("run", "--resume"), "Option '--resume' requires an argument."),
    (("run", "--resume", "absent"), "resume 'absent': there is no run in it, so there is nothing to resume."),
    (("run", "--resume", "full"), "resume 'full': there is no run in it"),
    (("run", "--resume", "old", "--out", "old"), "--out is 'old': it must be left out, since --resume names"),
    (("run", "--retry", "crashed"), "--retry is 'crashed': it needs --resume DIR."),
    (("run", "--resume", "old", "--retry", "crash"), "--retry 'crash' is unknown: did you mean 'crashed'?"),
    (("run", "--resume", "old", "--retry", "ok"), "--retry 'ok' is unknown"),
    (("run", "--threads", "100000"), "num_threads is 100000: it must be an integer from 1 to 1024"),
    (("run", "--case-timeout-s", "inf"), "case_timeout_s is inf: it must be a finite number above 0 and at most"),
    (("run", "--out", "full"), "out 'full' holds files of something else: name an empty or a new folder."),
    (("run", "--out", "good.jsonl/x"), "out 'good.jsonl/x' cannot be written: Not a directory."),
    (("run", "--out", "old"), "out 'old' holds another run: continue it with --resume, or name a new folder."),
    (("run", "--sed", "1"), "No such option: --sed"),
    (("rum",), "No such command 'rum'"),
    (("report", "absent"), "records file 'absent' cannot be read: No such file or directory."),
    (("report", "future"), "its schema is 99, of a newer rlhfbench: this one reads up to schema 2."),
    (("report", "old"), "run 'old' holds no records yet: there is nothing to draw."),
    (("report",), "Missing argument 'RUN [RUN…]'."),
    (("report", "old", "--out", "x"), "--out is 'x': it needs two runs or more; the report of one run goes into its"),
    (("report", "old", "./old"), "RUN names one folder twice: compare a run with another one."),
    (("report", "old", "future"), "run 'old' holds no records yet: there is nothing to draw."),
    (("run", "--model", "~nobody-at-all/m"), "model '~nobody-at-all/m' cannot be read: Could not determine home"),
    (
        ("gate", "--self-test", "--model", "~nobody-at-all/m"),
        "model '~nobody-at-all/m' cannot be read: Could not determ",
    ),
    (("run", "--model", "a/b--c"), "model 'a/b--c': there is no such folder here, and a model on the hub cannot have"),
    (("run", "--model", LONG), "xxx... cannot be read: File name too long."),
    (("run", "--option", "rollout.stop_token_id=8192"), "it must be below 8192, the vocabulary of model 'tiny'."),
    (("run", "--out", ""), "--out is '': it must name a folder or a file."),
    (("run", "--resume", ""), "--resume is '': it must name a folder or a file."),
    (("plan", "--out", ""), "--out is '': it must name a folder or a file."),
    (("plan", "--out", LONG), "' cannot be written: File name too long."),
    (("report", ""), "RUN is '': it must name a folder or a file."),
    (("watch", ""), "RUN is '': it must name a folder or a file."),
    (("evidence", "--out", ""), "--out is '': it must name a folder or a file."),
    (("gate", "--baseline", ""), "--baseline is '': it must name a folder or a file."),
    (("run", "--sweep", ""), "--sweep is '': it must name a folder or a file."),
    *(
        ((*verb, flag, ""), f"{flag} is '': it must not be empty; is a variable not set?")
        for verb, flag in (
            (("run",), "--ray"),
            (("run", "--ray", "local"), "--ray-group"),
            (("run", "--resume", "old"), "--setting"),
            (("gate",), "--base"),
            (("watch", "old"), "--host"),
        )
    ),
    (("plan", "--device", ""), "device '' is unknown: Valid: cpu, cuda, cuda:0."),
    (("evidence", "--out", "new", "--device", ""), "device '' is unknown: Valid: cpu, cuda, cuda:0."),
    (("evidence", "--out", "new", "--device", "cpu", "--model", ""), "model is '': it must be a non-empty string."),
    (
        ("run", "--lora-rank", "8", "--option", "lora.r=64"),
        "--lora-rank is 8 and --option lora.r is 64: give one of the two.",
    ),
    (
        ("plan", "--prompts", "good.jsonl", "--option", "data.prompts=bad.jsonl"),
        "--prompts is 'good.jsonl' and --option data.prompts is 'bad.jsonl': give one of the two.",
    ),
    (
        ("plan", "--option", "lora.r=8", "--option", "lora.r=16"),
        "--option lora.r is 8 and 16: give one, or a list in a sweep file.",
    ),
    (("run", "--global-batch", "--batch-sizes", "8"), "--global-batch needs --world-size N."),
    (("run", "--methods", "dpo", "--prompt-field", "q"), "--prompt-field is 'q': it needs --prompts FILE."),
    (("plan", "--device", "cuda:01"), "device 'cuda:01' is unknown"),
    (("run", "--resume", LONG), "' cannot be used: File name too long."),
    (("report", LONG), "' cannot be used: File name too long."),
    (("watch", LONG), "' cannot be used: File name too long."),
    (("report", "old", "future", "--out", "good.jsonl"), "out 'good.jsonl' cannot be written: Not a directory."),
    (("plan", "--out", "good.jsonl/x"), "out 'good.jsonl/x' cannot be written: Not a directory."),
    (("gate", "--base", "main", "--out", "good.jsonl/x"), "--out 'good.jsonl/x' cannot be written: Not a directory."),
    (
        ("gate", "--baseline", "good.jsonl", "--update-baseline"),
        "baseline 'good.jsonl' cannot be written: Not a directory.",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "says"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_mistake_is_one_clear_sentence_and_exit_code_2(call, tmp_path, arguments, says):
    (tmp_path / "good.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "hello"}\n{\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "typo.toml").write_text('metods = ["hydra"]\n')
    for folder, name, text in (
        ("full", "thesis.tex", ""),
        ("future", "records.jsonl", '{"schema": 99}\n'),
        ("old", "records.jsonl", ""),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert err.endswith((".\n", "?\n"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_flag_and_an_option_may_say_the_same(call):
    code, out, _ = call(
        *("plan", "--model", "tiny", "--methods", "lora", "--seq-lens", "8", "--batch-sizes", "1", "--json"),
        *("--lora-rank", "8", "--option", "lora.r=8"),
    )
    assert (code, '"r": 8' in out) == (0, True)


@pytest.mark.parametrize(
    "command",
    [
        ("evidence", "--out", "new"),
        ("plan", "--model", "tiny"),
        ("report", "absent"),
        ("verify", "--model", "tiny"),
        ("watch", "absent"),
        ("gate", "--self-test"),
    ],
    ids=lambda command: command[0],
)
def test_a_verb_of_one_process_refuses_a_launcher(call, monkeypatch, tmp_path, command):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = f"rlhfbench {command[0]} runs in one process, and a launcher started 2: start it without one.\n"
    assert call(*command) == (2, "", sentence)
    assert not list(tmp_path.iterdir())


def test_cuda_without_a_cuda_device(call, monkeypatch):
    from rlhfbench.cases import preflight

    monkeypatch.setattr(preflight, "num_cuda_devices", lambda: 0)
    assert call("run", "--device", "cuda") == (2, "", "device 'cuda': this machine has no CUDA device.\n")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("method", "flag", "text", "sentence"),
    [
        ("dpo", "--pairs", None, "pairs 'x.jsonl' cannot be read: No such file or directory."),
        ("dpo", "--pairs", "", "pairs 'x.jsonl' is empty: it must hold at least one row."),
        ("dpo", "--pairs", '{"prompt": "a",\n', "pairs 'x.jsonl', line 1: it is not JSON."),
        (
            "dpo",
            "--pairs",
            '{"prompt": "a", "chosen": "b"}\n',
            "pairs 'x.jsonl', line 1: there is no field 'rejected'; its fields are 'prompt', 'chosen'.",
        ),
        (
            "sft",
            "--demonstrations",
            '{"prompt": "a", "completion": ""}\n',
            "demonstrations 'x.jsonl', line 1: field 'completion' must be a text that is not empty, or a list of "
            "messages (role, content).",
        ),
        (
            "dpo",
            "--pairs",
            '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
            "pairs 'x.jsonl': chosen equals rejected in every row, so no pair is left.",
        ),
        ("hydra", "--pairs", "", "data.pairs is 'x.jsonl': method 'hydra' takes prompts, so it must be none."),
    ],
)
def test_a_bad_data_file_is_one_sentence_and_starts_nothing(call, tmp_path, method, flag, text, sentence):
    if text is not None:
        (tmp_path / "x.jsonl").write_text(text)
    small = ("--model", "tiny", "--seq-lens", "8", "--batch-sizes", "1")
    code, out, err = call("run", "--methods", method, *small, flag, "x.jsonl", "--out", "here")
    assert (code, out, err) == (2, "", sentence + "\n")
    assert not (tmp_path / "here").exists()
