"""A saved folder opens wherever transformers is installed, also without this repository; and `models.export`."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import command
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import letter_tokenizer, some_ids, tiny_base, tiny_memory
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import MLPMemory
from models.gate import LambdaGate
from models.stack import base_id
from utils.artefact import Made

FAMILIES = ("gpt2", "llama", "mistral", "gemma")
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
PROMPTS = ["hello", "a longer prompt"]

# Run where only the folder is.
OPENED = f"""
import importlib.util, json, sys
sys.modules["accelerate"] = sys.modules["datasets"] = None  # as if they were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

names = ("models", "utils", "accelerate", "datasets")
found = {{"project": [name for name in names if importlib.util.find_spec(name)]}}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer({PROMPTS}, return_tensors="pt", padding=True)
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        untrusted = "trust_remote_code=True" in str(error)
    model.save_pretrained("again")
    again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
    generator = pipeline("text-generation", model=folder, trust_remote_code=True)
    chat = generator([{{"role": "user", "content": "hi"}}], max_new_tokens=5, do_sample=False)
    found[folder] = {{
        "class": [type(model).__module__.split(".")[0], type(model).__name__, type(generator.model).__name__],
        "greedy": model.generate(**batch, max_new_tokens=8, do_sample=False).tolist(),
        "beams": model.generate(**batch, max_new_tokens=8, do_sample=False, num_beams=3).tolist(),
        "again": again.generate(**batch, max_new_tokens=8, do_sample=False).tolist(),
        "untrusted": untrusted,
        "lambda": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, lmbda=0.125).lmbda,
        "chat": chat[0]["generated_text"][-1]["content"],
    }}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A base with a chatting tokenizer and its memory for each family."""
    folder = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        base = tiny_base(family, vocab_size=112)  # families add tokens of their own to the 97
        base.save_pretrained(folder / family / "base")
        tokenizer = letter_tokenizer()
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder / family / "base")
        tiny_memory(base).save_pretrained(folder / family / "memory")
    torch.manual_seed(0)
    LambdaGate(32, memory_temp=2.0).save(folder / "mistral" / "memory")
    return folder


def test_every_family_generates_the_same_with_transformers_alone(sources, tmp_path):
    folders, expected = [], {}
    for family in FAMILIES:
        lmbda = "adaptive" if family == "mistral" else 0.5
        base, memory = sources / family / "base", sources / family / "memory"
        command("models.export", base, memory, tmp_path / family, "--lmbda", lmbda, "--knn_temp", 2, "--include_base")
        folder = tmp_path / "moved" / f"my.{family}-memory"
        folder.parent.mkdir(exist_ok=True)
        (tmp_path / family).rename(folder)
        folders.append(folder)
        joint = MLPMemory.from_pretrained(base, memory, lmbda=lmbda, knn_temp=2.0)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
        answer = joint.generate(**chat, max_new_tokens=5, do_sample=False)[0, chat["input_ids"].shape[1] :]
        greedy = joint.generate(**batch, max_new_tokens=8, do_sample=False).tolist()
        expected[str(folder)] = {
            "class": ["transformers_modules", "MLPMemory", "MLPMemory"],
            "greedy": greedy,
            "beams": joint.generate(**batch, max_new_tokens=8, do_sample=False, num_beams=3).tolist(),
            "again": greedy,
            "untrusted": True,
            "lambda": 0.125,
            "chat": tokenizer.decode(answer, skip_special_tokens=True),
        }
        texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".py", ".jinja")]
        assert not [text for text in texts if str(tmp_path) in text or str(sources) in text]
    (tmp_path / "elsewhere").mkdir()
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPENED, *map(str, folders)],
        cwd=tmp_path / "elsewhere",
        env=environment | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("project") == []
    assert found == expected


def test_an_older_transformers_is_refused(exported, monkeypatch):
    """By the file of the folder's code that transformers runs first."""
    file, _, _ = json.loads((exported / "config.json").read_text())["auto_map"]["AutoConfig"].partition(".")
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"transformers.*4\.57\.1"):
        runpy.run_path(str(exported / f"{file}.py"))
    imports = [
        line for line in (exported / f"{file}.py").read_text().splitlines() if line.startswith(("from", "import"))
    ]
    assert not [line for line in imports if line.startswith("from .")]


@pytest.fixture
def joint(sources):
    return MLPMemory.from_pretrained(sources / "llama" / "base", sources / "llama" / "memory", lmbda=0.5)


@pytest.fixture
def exported(joint, tmp_path):
    joint.save_pretrained(tmp_path / "exported", include_base=True)
    return tmp_path / "exported"


@pytest.mark.parametrize("name", ["someone/a-base", "/no/such/base"])
def test_a_folder_without_its_base_names_it_and_takes_another(joint, sources, tmp_path, name):
    joint.config.base_model_name_or_path = name
    joint.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}.*base_model_name_or_path="):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for opener in (AutoModelForCausalLM, MLPMemory):
        again = opener.from_pretrained(tmp_path, base_model_name_or_path=str(sources / "llama" / "base"))
        assert torch.equal(again(some_ids()).logits, joint(some_ids()).logits)


def test_a_base_other_than_the_recorded_one_gives_a_warning(sources, tmp_path, caplog):
    shutil.copytree(sources / "llama" / "base", tmp_path / "base")
    joint = MLPMemory.from_pretrained(tmp_path / "base", sources / "llama" / "memory")
    joint.save_pretrained(tmp_path / "joint")
    AutoModelForCausalLM.from_pretrained(tmp_path / "joint")
    assert "another base" not in caplog.text
    tiny_base("llama", vocab_size=112, rms_norm_eps=1e-4).save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "joint")
    assert "another base" in caplog.text


@pytest.mark.parametrize("hub", [True, False])
def test_push_to_hub_uploads_a_folder_that_opens_anywhere(joint, tmp_path, monkeypatch, hub):
    """A fake hub keeps what is uploaded."""
    there = tmp_path / "there"

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, commit_message):
            assert repo_id == "me/my-memory"
            shutil.copytree(folder_path, there)

    monkeypatch.setattr("models.mlpMemory.HfApi", Hub)
    if hub:
        joint.config.base_model_name_or_path = "someone/a-base"
    joint.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/my-memory", token="a")
    assert (there / "base").exists() != hub and (there / "memory" / "model.safetensors").is_file()
    if not hub:
        again = AutoModelForCausalLM.from_pretrained(there)
        assert torch.equal(again(some_ids()).logits, joint(some_ids()).logits)


def test_the_command_says_where_the_base_must_stay(sources, tmp_path, capsys):
    base = sources / "llama" / "base"
    (tmp_path / "results.json").write_text(json.dumps({"perplexity": 12.5, "model": str(base)}))
    words = (base, sources / "llama" / "memory", tmp_path / "out")
    command("models.export", *words, "--lmbda", 0.3, "--memory_temp", 2, "--results", tmp_path / "results.json")
    assert "--include_base" in capsys.readouterr().out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lmbda, again.knn_temp) == (0.3, 2.0)
    assert "12.5" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "more", "named"),
    [
        ({"base": "nowhere/at-all"}, (), "nowhere/at-all"),
        ({"memory": "gpt2/memory"}, (), "gpt2"),
        ({"folder": "llama"}, (), "llama"),
        ({}, ("--lmbda", "half"), "--lmbda"),
        ({}, ("--lmbda", "1.5"), "1.5"),
        ({}, ("--lmbda", "adaptive"), "training.gate"),
        ({}, ("--knn_temp", "0"), "temperature"),
        ({}, ("--layer_position", "7"), "layer_position"),
        ({}, ("--results", "none.json"), "none.json"),
    ],
)
def test_user_errors_of_the_command_write_nothing(sources, monkeypatch, capsys, changes, more, named):
    monkeypatch.chdir(sources)
    before = sorted(sources.rglob("*"))
    words = {"base": "llama/base", "memory": "llama/memory", "folder": "out"} | changes
    with pytest.raises(SystemExit) as ended:
        command("models.export", *words.values(), *more)
    assert ended.value.code == 2 and named in capsys.readouterr().err
    assert sorted(sources.rglob("*")) == before


def refused(capsys, *words):
    """The command's one line on stderr; its status is 2."""
    with pytest.raises(SystemExit) as ended:
        command("models.export", *words)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("damage", ["no head", "a lost layer", "body only", "more layers in the config", "truncated"])
def test_a_base_whose_checkpoint_is_not_whole_is_refused(sources, tmp_path, capsys, damage):
    base = shutil.copytree(sources / "llama" / "base", tmp_path / "base")
    weights, config = base / "model.safetensors", json.loads((base / "config.json").read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "body only":
        tiny_base("llama", vocab_size=112).model.save_pretrained(base)
    elif damage == "more layers in the config":
        (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    else:
        lost = {"no head": "lm_head.", "a lost layer": "model.layers.1."}[damage]
        state = {name: value for name, value in load_file(weights).items() if not name.startswith(lost)}
        save_file(state, weights, {"format": "pt"})
    assert str(base) in refused(capsys, base, sources / "llama" / "memory", tmp_path / "out", "--include_base")
    assert not (tmp_path / "out").exists()


def test_a_memory_trained_for_another_base_or_block(sources, tmp_path, capsys):
    base, memory = sources / "llama" / "base", shutil.copytree(sources / "llama" / "memory", tmp_path / "memory")
    made = Made("memory", {"layer_position": 0}, made_from={"base": base_id(base)})
    (memory / "made.json").write_text(made.text)
    command("models.export", base, memory, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").layer_position == 0
    tiny_base("llama", vocab_size=112, rms_norm_eps=1e-4).save_pretrained(tmp_path / "base")
    for trained in (memory, tmp_path / "out"):
        assert str(trained) in refused(capsys, tmp_path / "base", trained, tmp_path / "other")
    assert not (tmp_path / "other").exists()


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((each, 2) for each in (ImportError("bitsandbytes"), NotImplementedError("4-bit"), OSError(28, FULL))),
        *((each, 2) for each in (SafetensorError(FULL), Exception(FULL))),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_failure_while_writing_ends_without_a_traceback(sources, tmp_path, monkeypatch, capsys, error, status):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    with pytest.raises(SystemExit) as ended:
        command("models.export", *(sources / "llama" / name for name in ("base", "memory")), tmp_path / "out")
    assert ended.value.code == status and len(capsys.readouterr().err.splitlines()) == (status == 2)
    assert not (tmp_path / "out").exists()
