"""A saved folder opens wherever transformers is: in an environment of torch and transformers alone, in another folder."""

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
import torch
from harness import command
from packaging.requirements import Requirement
from tiny_models import letter_tokenizer, some_ids, tiny_base, tiny_memory
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import MLPMemory, load_memory
from models.capture import decoder_blocks
from models.gate import LambdaGate

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "gemma")
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
PROMPTS = ["hello", "a longer prompt"]

# Run where only the folder is: everything that a folder is asked for, as JSON.
OPENED = f"""
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

found = {{"strangers": [name for name in ("models", "utils", "accelerate", "datasets") if importlib.util.find_spec(name)]}}
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
    torch.manual_seed(0)
    generator = pipeline("text-generation", model=folder, trust_remote_code=True)
    chat = generator([{{"role": "user", "content": "hi"}}], max_new_tokens=5, do_sample=False)
    found[folder] = {{
        "class": f"{{type(model).__module__.split('.')[0]}} {{type(model).__name__}} {{type(generator.model).__name__}}",
        "greedy": model.generate(**batch, max_new_tokens=8, do_sample=False).tolist(),
        "beams": model.generate(**batch, max_new_tokens=8, do_sample=False, num_beams=3).tolist(),
        "sampled": model.generate(**batch, max_new_tokens=8, do_sample=True).tolist(),
        "again": again.generate(**batch, max_new_tokens=8, do_sample=False).tolist(),
        "untrusted": untrusted,
        "half": str(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).dtype),
        "lambda": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, lmbda=0.125).lmbda,
        "plain": generator("hello", max_new_tokens=5, do_sample=False)[0]["generated_text"],
        "chat": chat[0]["generated_text"][-1]["content"],
    }}
print(json.dumps(found))
"""


def with_requirements(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions of these names and of all that they need."""
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            needs = [Requirement(line) for line in found[name].requires or ()]
            waiting += [each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python of an environment of its own that holds torch, transformers and what they need: links to those here."""
    folder = tmp_path_factory.mktemp("bare")
    try:
        distributions = with_requirements("torch", "transformers")
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"an environment of torch and transformers cannot be made from what is installed: {error}")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in distributions.values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


def run_elsewhere(python: Path, folder: Path, code: str, *words: object) -> subprocess.CompletedProcess:
    """Run `code` with a bare Python in `folder`, without network, module cache or path of this process's."""
    folder.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [python, "-c", code, *map(str, words)],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done


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


def texts_below(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.suffix in (".json", ".md", ".py", ".jinja")
    }


def test_every_family_generates_the_same_where_only_transformers_is(sources, bare_python, tmp_path):
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
        assert tokenizer(PROMPTS).input_ids == AutoTokenizer.from_pretrained(base)(PROMPTS).input_ids
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        hello = tokenizer("hello", return_tensors="pt")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
        expected[str(folder)] = {
            "class": "transformers_modules MLPMemory MLPMemory",
            "greedy": joint.generate(**batch, max_new_tokens=8, do_sample=False).tolist(),
            "beams": joint.generate(**batch, max_new_tokens=8, do_sample=False, num_beams=3).tolist(),
            "untrusted": True,
            "half": "torch.bfloat16",
            "lambda": 0.125,
            "plain": tokenizer.decode(
                joint.generate(**hello, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True
            ),
            "chat": tokenizer.decode(
                joint.generate(**chat, max_new_tokens=5, do_sample=False)[0, chat["input_ids"].shape[1] :],
                skip_special_tokens=True,
            ),
        }
        assert not [name for name, text in texts_below(folder).items() if str(tmp_path) in text or str(sources) in text]
    done = run_elsewhere(bare_python, tmp_path / "elsewhere", OPENED, *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("strangers") == []
    for folder, facts in found.items():
        assert {len(row) for row in facts.pop("sampled")} <= {len(facts["greedy"][0])}
        assert facts.pop("again") == facts["greedy"]
        assert facts == expected[folder]


def test_an_older_transformers_is_refused_with_the_version_that_can(exported, monkeypatch):
    """By the first file of the folder's code that transformers runs, which needs nothing that an older one lacks."""
    file, _, _ = json.loads((exported / "config.json").read_text())["auto_map"]["AutoConfig"].partition(".")
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"transformers 5 or newer; 4\.57\.1, .* pip install -U"):
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


@pytest.mark.parametrize("by_name", [True, False])
def test_what_lies_beside_the_memory_travels_with_it(sources, tmp_path, monkeypatch, by_name):
    """A further network and its settings; a checkpoint's training state does not."""
    shutil.copytree(sources / "llama", tmp_path / "mine")
    memory = tmp_path / "mine" / "memory"
    for name in ("gate.safetensors", "gate.json", "other/config.json", "other/model.safetensors"):
        (memory / name).parent.mkdir(exist_ok=True)
        (memory / name).write_text(name)
    (memory / "state").mkdir()
    (memory / "state" / "model.safetensors").write_text("of the trainer")
    monkeypatch.chdir(tmp_path / "mine")
    pair = ("base", "memory") if by_name else (AutoModelForCausalLM.from_pretrained("base"), load_memory("memory"))
    joint = MLPMemory.from_pretrained(*pair)
    monkeypatch.chdir(tmp_path)
    joint.save_pretrained("one")
    MLPMemory.from_pretrained("one").save_pretrained("one")
    found = sorted(str(path.relative_to("one/memory")) for path in Path("one/memory").rglob("*") if path.is_file())
    assert found == [
        *("config.json", "gate.json", "gate.safetensors", "model.safetensors"),
        *("other/config.json", "other/model.safetensors"),
    ]


def test_a_joint_folder_opened_by_a_relative_path_keeps_its_own_tokenizer(exported, monkeypatch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokenizer.chat_template = "of this folder alone"
    tokenizer.save_pretrained(exported)
    monkeypatch.chdir(exported.parent)
    joint = MLPMemory.from_pretrained(exported.name)
    monkeypatch.chdir(exported)
    joint.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == "of this folder alone"


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_saved_by_an_earlier_version_opens(joint, sources, tmp_path, inside):
    """Its config has the base's whole path and no more than this, and there is no code."""
    base, old = sources / "llama" / "base", tmp_path / "old"
    joint.knn_generator.save_pretrained(old / "memory")
    if inside:
        shutil.copytree(base, old / "base")
    settings = {"lmbda": 0.5, "knn_temp": 1.0, "layer_position": -1, "model_type": "mlp_memory"}
    named = {"architectures": ["MLPMemory"], "base_model_name_or_path": "/gone/base" if inside else str(base)}
    text = {"text_config": json.loads((base / "config.json").read_text()) | {"_name_or_path": str(base)}}
    (old / "config.json").write_text(json.dumps(settings | named | text))
    for opener in (AutoModelForCausalLM, MLPMemory):
        again = opener.from_pretrained(old)
        assert torch.equal(again(some_ids()).logits, joint(some_ids()).logits)
    again.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "mlpMemory.py").is_file() and (tmp_path / "new" / "base").exists() == inside
    assert torch.equal(MLPMemory.from_pretrained(tmp_path / "new")(some_ids()).logits, joint(some_ids()).logits)


@pytest.mark.parametrize("name", ["someone/a-base", "/no/such/base"])
def test_a_folder_without_its_base_names_it_and_takes_another(joint, sources, tmp_path, name):
    joint.save_pretrained(tmp_path, base_reference=name)
    with pytest.raises(ValueError, match=rf"belongs to the base {name}, which .*base_model_name_or_path=") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    for opener in (AutoModelForCausalLM, MLPMemory):
        again = opener.from_pretrained(tmp_path, base_model_name_or_path=str(sources / "llama" / "base"))
        assert torch.equal(again(some_ids()).logits, joint(some_ids()).logits)


def test_another_base_can_be_given_in_place_of_the_one_inside(exported, sources, tmp_path):
    other = tiny_base("llama", seed=5, vocab_size=112)
    other.save_pretrained(tmp_path / "other")
    again = AutoModelForCausalLM.from_pretrained(exported, base_model_name_or_path=str(tmp_path / "other"), lmbda=0.0)
    assert torch.equal(again(some_ids()).logits, other(some_ids()).logits.log_softmax(-1))


def test_other_weights_than_those_recorded_are_told_once_with_both_fingerprints(sources, tmp_path, caplog):
    shutil.copytree(sources / "llama" / "base", tmp_path / "base")
    joint = MLPMemory.from_pretrained(tmp_path / "base", sources / "llama" / "memory")
    joint.save_pretrained(tmp_path / "joint")
    AutoModelForCausalLM.from_pretrained(tmp_path / "joint")
    assert "with the weights" not in caplog.text
    recorded = json.loads((tmp_path / "joint" / "config.json").read_text())["base_fingerprint"]
    tiny_base("llama", seed=5, vocab_size=112).save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "joint")
    (told,) = [record.getMessage() for record in caplog.records if "with the weights" in record.getMessage()]
    MLPMemory.from_pretrained(tmp_path / "base", sources / "llama" / "memory").save_pretrained(tmp_path / "new")
    found = json.loads((tmp_path / "new" / "config.json").read_text())["base_fingerprint"]
    assert recorded in told and found in told and recorded != found


def test_the_card_names_a_base_of_the_hub_and_no_local_path(joint, tmp_path):
    rows = {"model": str(tmp_path), "dataset": "wiki/articles", "perplexity": 9.5812, "grid": [1]}
    joint.save_pretrained(tmp_path / "one", base_reference="someone/a-base", results=rows)
    card = (tmp_path / "one" / "README.md").read_text()
    assert 'base_model: "someone/a-base"' in card and "9.581" in card and "wiki/articles" in card
    joint.save_pretrained(tmp_path / "two", results=rows)
    alone = (tmp_path / "two" / "README.md").read_text()
    assert "base_model:" not in alone and "LlamaForCausalLM" in alone
    assert str(tmp_path) not in card + alone + (tmp_path / "one" / "config.json").read_text()


@pytest.mark.parametrize("hub", [True, False])
def test_push_to_hub_uploads_the_folder_that_is_saved(joint, tmp_path, monkeypatch, hub):
    """A stand-in takes the place of the upload and keeps what would go."""
    joint.save_pretrained(tmp_path / "saved", include_base=not hub, base_reference="someone/a-base" if hub else None)
    if hub:
        joint.config.base_model_name_or_path = "someone/a-base"
        monkeypatch.setattr("models.joint_files.not_found_again", lambda *_: None)
    from huggingface_hub import RepoUrl
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub as transformers_hub

    class Stand:
        def create_repo(self, name, **_):
            return RepoUrl(f"https://hub/{name}", endpoint="https://hub")

        def create_commit(self, operations, **_):
            for each in operations:
                (tmp_path / "there" / each.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(each.path_or_fileobj, tmp_path / "there" / each.path_in_repo)

    def no_card(*_, **__):
        raise EntryNotFoundError("none")

    monkeypatch.setattr(transformers_hub, "hf_api", Stand)
    monkeypatch.setattr(transformers_hub.ModelCard, "load", no_card)
    joint.push_to_hub("me/my-memory")
    assert texts_below(tmp_path / "there") == texts_below(tmp_path / "saved")
    assert (tmp_path / "there" / "memory" / "model.safetensors").is_file()
    assert (tmp_path / "there" / "base").exists() != hub


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_is_the_bases(exported, joint, place):
    again = AutoModelForCausalLM.from_pretrained(exported, device_map=place)
    assert torch.equal(again(some_ids()).logits, joint(some_ids()).logits)


@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize("include_base", [None, True])
def test_a_quantised_base_stays_so_and_its_memory_plain(sources, tmp_path, include_base):
    """BitNet's layers: the one quantisation of transformers that needs neither a GPU nor a further package."""
    shutil.copytree(sources / "llama" / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    method = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    joint = MLPMemory.from_pretrained(tmp_path / "base", sources / "llama" / "memory")
    joint.save_pretrained(tmp_path / "joint", include_base=include_base)
    assert (tmp_path / "joint" / "base").exists() == bool(include_base)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "joint")
    blocks = again.knn_generator.blocks[0], decoder_blocks(again.base_lm)[0]
    assert [type(block.mlp.up_proj).__name__ for block in blocks] == ["Linear", "AutoBitLinear"]
    assert torch.equal(again(some_ids()).logits, joint(some_ids()).logits)
    assert again.generate(some_ids(), max_new_tokens=4, num_beams=2).shape == (2, 16)


def test_the_command_tells_where_the_base_must_stay(sources, tmp_path, capsys):
    base = sources / "llama" / "base"
    (tmp_path / "results.json").write_text(json.dumps({"perplexity": 12.5, "model": str(base)}))
    words = (base, sources / "llama" / "memory", tmp_path / "out")
    command("models.export", *words, "--lmbda", 0.3, "--results", tmp_path / "results.json")
    assert "--include_base" in capsys.readouterr().out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lmbda, again.knn_temp) == (0.3, 1.0)
    assert "12.5" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "more", "expected"),
    [
        ({"base": "nowhere/at-all"}, (), "error: nowhere/at-all: cannot be loaded"),
        ({"memory": "nowhere/at/all"}, (), "nowhere/at/all: no such folder"),
        ({"memory": "gpt2/memory"}, (), "for the gpt2 family, the base is llama"),
        ({"folder": "llama"}, (), "its memory belongs to no joint model and would be overwritten"),
        ({}, ("--lmb", "0.5"), "unrecognized arguments: --lmb"),
        ({}, ("--lmbda", "half"), "'half': expected a number from 0 to 1, or adaptive"),
        ({}, ("--lmbda", "1.5"), "lambda 1.5: expected a number from 0 to 1"),
        ({}, ("--knn_temp", "0"), "memory temperature 0: expected a number above 0"),
        ({}, ("--layer_position", "7"), "layer_position 7: the model has 2 blocks"),
        ({}, ("--results", "none.json"), "none.json"),
    ],
)
def test_bad_input_of_the_command_is_told_in_one_line(sources, monkeypatch, capsys, changes, more, expected):
    monkeypatch.chdir(sources)
    before = sorted(sources.rglob("*"))
    words = {"base": "llama/base", "memory": "llama/memory", "folder": "out"} | changes
    with pytest.raises(SystemExit) as ended:
        command("models.export", *words.values(), *more)
    (told,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and told.startswith("error: ") and expected in told
    assert sorted(sources.rglob("*")) == before
