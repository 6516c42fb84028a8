"""Pushing, against a hub of our own that speaks HTTP."""

import json
import os
import shutil
import subprocess
import sys

import hub_server
import pytest
import torch
from conftest import tiny_llama, trainer_for, weights
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from hf_lpdecay import LpDecayConfig, load_sparse, measure_sparsity, push_to_hub
from hf_lpdecay.sparsity import select_parameters


@pytest.fixture
def hub():
    with hub_server.running() as server:
        yield server


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process, pointed at that hub without a token of its own. huggingface_hub reads the environment at import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return hub


@pytest.fixture(scope="session")
def sparse_folder(tmp_path_factory):
    """A model that is half zeros, its record, and what a training leaves beside it."""
    folder = tmp_path_factory.mktemp("sparse")
    model = tiny_llama()
    for param in select_parameters(model).values():
        param.data[:, ::2] = 0.0
    model.save_pretrained(folder)
    measure_sparsity(model).to_json(folder / "sparsity.json")
    (folder / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/model.safetensors", "training_args.bin", "optimizer.pt", "x.tmp", ".hidden", "run.yaml"):
        (folder / name).write_bytes(b"\x80 not for others")
    return folder


@pytest.fixture
def folder(sparse_folder, tmp_path):
    return shutil.copytree(sparse_folder, tmp_path / "model")


PUSHED = ["README.md", "config.json", "generation_config.json", "model.safetensors", "sparsity.json"]
SCRIPT = """
import json, sys
import transformers  # reads the environment before conftest takes the hub away
from conftest import trainer_for
from transformers import AutoModelForCausalLM
from hf_lpdecay import LpDecayConfig, push_to_hub

out, results = sys.argv[1], {}
base = AutoModelForCausalLM.from_pretrained("org/base")
config = LpDecayConfig(p=0.5, target_sparsity=0.5)
trainer = trainer_for(out, config, model=base, hub_model_id="trained", save_strategy="steps", save_steps=20)
trainer.train()
trainer.evaluate()
trainer.push_to_hub(dataset_tags="org/data", language="en")
results["loss"] = trainer.state.log_history[-1]["eval_loss"]
push = push_to_hub(out, "pushed", private=True, revision="sparse")
results["push"] = [push.repo_id, push.files, push.left_out, push.url]
for name, revision in (("me/trained", None), ("me/pushed", "sparse")):
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
    results[name] = all((a == b).all().item() for a, b in zip(model.parameters(), trainer.model.parameters()))
print(json.dumps(results))
"""


def test_what_a_trainer_and_the_function_push_is_loaded_from_the_hub_with_the_same_bits(hub, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.repos["org/base"] = hub_server.Repo(files={**files, "README.md": b"---\nlicense: mit\n---\n"})
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub_server.TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["me/trained"] and results["me/pushed"]

    pushed = hub.files("me/pushed", "sparse")
    name, sizes, left_out, url = results["push"]
    assert name == "me/pushed" and url.startswith(hub.url) and hub.repos["me/pushed"].private
    assert sizes == {name: len(content) for name, content in pushed.items()}
    assert {*PUSHED, "sparsity.png"} == set(pushed) and not hub.files("me/pushed")
    assert left_out == ["checkpoint-20/", "checkpoint-30/", "training_args.bin"]

    by_trainer, by_function = (
        files["README.md"].decode() for files in (hub.files("me/trained"), hub.files("me/pushed", "sparse"))
    )
    assert by_trainer == by_function.replace("me/pushed", "me/trained").replace("# pushed", "# trained")
    data = ModelCard(by_trainer).data
    assert (data.base_model, data.license, data.datasets, data.language) == ("org/base", "mit", ["org/data"], "en")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["sparsity", "pruning", "lp-weight-decay", "arxiv:2404.10824"]
    assert f"| **this model**, 50.0% of the selected weights zero | {results['loss']:.4g} |" in by_trainer
    record = json.loads(pushed["sparsity.json"])
    assert record["sparsity"] == 0.5 and record["results"]["after"]["loss"] == results["loss"]


def test_a_dry_run_says_what_would_be_pushed_and_touches_nothing(online, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    dry = push_to_hub(folder, "me/model", dry_run=True)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")} and not online.steps
    assert list(dry.files) == PUSHED and dry.url is None
    assert dry.left_out == ["checkpoint-3/", ".hidden", "optimizer.pt", "run.yaml", "training_args.bin", "x.tmp"]
    assert "would be pushed to me/model" in str(dry) and "left out: checkpoint-3/" in str(dry)

    done = push_to_hub(folder, "me/model", token=hub_server.TOKEN)
    assert done.files == dry.files == {name: len(data) for name, data in online.files("me/model").items()}
    assert online.steps[0] == "create" and online.steps[-1] == "commit"
    assert {"validate", "preupload", "batch", "put"} <= set(online.steps)
    assert f"pushed: {online.url}/me/model/commit/" in str(done)
    # The repository is there already, and so are the weights.
    online.steps.clear()
    push_to_hub(folder, "model", token=hub_server.TOKEN, commit_message="again")
    assert "put" not in online.steps and online.repos["me/model"].commits == ["Upload a sparse model", "again"]


@pytest.mark.parametrize(
    "step, how, kind, message",
    [
        ("create", 401, PermissionError, "the token is not valid, or no longer: run `hf auth login`"),
        ("create", 500, ConnectionError, "the hub cannot be reached or has failed: push again later"),
        ("create", "drop", ConnectionError, "the hub cannot be reached or has failed: push again later"),
        ("validate", 500, ConnectionError, "HTTP status 500"),
        ("preupload", 403, PermissionError, "it needs the write role"),
        ("preupload", 404, FileNotFoundError, "no such namespace, repository or branch"),
        ("put", 403, PermissionError, "it needs the write role"),
        ("commit", 409, OSError, "somebody else changed the repository at the same time: push again"),
        ("commit", 413, OSError, r"told to fail with 413\)"),
        ("commit", 500, ConnectionError, "Nothing on this side is lost"),
        ("commit", "drop", ConnectionError, "did not succeed: the hub cannot be reached"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_told_with_its_cure_and_loses_nothing(online, folder, step, how, kind, message):
    before = load_file(folder / "model.safetensors")
    online.fail(step, how)
    with pytest.raises(kind, match=message) as told:
        push_to_hub(folder, "me/model", token=hub_server.TOKEN)
    assert "The push to me/model did not succeed" in str(told.value) and "\n" not in str(told.value)
    assert not any(online.files(name) for name in online.repos)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The same call succeeds once the hub is well.
    online.failures.clear()
    push_to_hub(folder, "me/model", token=hub_server.TOKEN)
    assert sorted(online.files("me/model")) == PUSHED


def test_an_upload_that_fails_once_is_tried_again(online, folder):
    online.fail("put", 500, times=1)
    push_to_hub(folder, "me/model", token=hub_server.TOKEN)
    assert online.steps.count("put") == 2 and sorted(online.files("me/model")) == PUSHED


def test_tokens_namespaces_and_privacy(online, folder, monkeypatch):
    with pytest.raises(PermissionError, match="There is no token for the hub: run `hf auth login`, set HF_TOKEN"):
        push_to_hub(folder, "me/model")
    assert not online.steps
    with pytest.raises(PermissionError, match="may not write there"):
        push_to_hub(folder, "me/model", token=hub_server.READ_TOKEN)
    with pytest.raises(PermissionError, match="you are not a member of others"):
        push_to_hub(folder, "others/model", token=hub_server.TOKEN)
    with pytest.raises(PermissionError, match="the token is not valid"):
        push_to_hub(folder, "me/model", token="hf_wrong")
    with pytest.raises(ValueError, match="Repo id must"):
        push_to_hub(folder, "me/my/model", token=hub_server.TOKEN)
    (folder.parent / "token").write_text(hub_server.TOKEN)  # as `hf auth login` leaves it
    push_to_hub(folder, "me/model")
    with pytest.raises(PermissionError, match="me/model exists and is public, but private=True"):
        push_to_hub(folder, "me/model", private=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(folder, "me/model")


def test_a_folder_that_is_not_a_whole_model_is_refused(folder, tmp_path):
    def refused(kind, message):
        with pytest.raises(kind, match=message):
            push_to_hub(folder, "me/model", dry_run=True)

    torch.save({}, folder / "pytorch_model.bin")
    refused(ValueError, "pytorch_model.bin is a pickle, which runs code when it is loaded")
    (folder / "pytorch_model.bin").write_bytes(b"plain data that is called so")
    assert "pytorch_model.bin" in push_to_hub(folder, "me/model", dry_run=True).files

    record = (folder / "sparsity.json").read_text()
    (folder / "sparsity.json").write_text("{")
    refused(ValueError, r"sparsity.json is not a sparsity report \(.*Write it anew: measure_sparsity")
    (folder / "sparsity.json").write_text(record)
    model = tiny_llama()
    model.save_pretrained(folder)
    refused(ValueError, r"is of another model: its .*down_proj.weight has shape .*1,024 zeros, .* and 0\.")

    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    next(folder.glob("model-00002-*")).unlink()
    refused(FileNotFoundError, "There is no model-00002-of-.*: save the model there with save_pretrained")
    for path in folder.glob("model*"):
        path.unlink()
    refused(FileNotFoundError, "There is no model.safetensors in")
    (folder / "model.safetensors").write_bytes(b"damaged")
    refused(ValueError, "model.safetensors cannot be read")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "There is no config.json in .* It holds an adapter: merge it")


def test_without_a_record_the_zeros_are_counted_in_the_files(online, folder):
    expected = json.loads((folder / "sparsity.json").read_text())
    (folder / "sparsity.json").unlink()
    push_to_hub(folder, "me/model", token=hub_server.TOKEN)
    assert json.loads(online.files("me/model")["sparsity.json"]) == expected
    card = ModelCard(online.files("me/model")["README.md"].decode())
    assert card.data.tags == ["sparsity", "pruning"]  # of the decay nothing is known
    assert "## Training" not in card.text and "50.0%" in card.text


def test_a_card_of_ones_own_is_pushed_as_it_is(online, folder):
    push_to_hub(folder, "me/model", token=hub_server.TOKEN)
    ours = (folder / "README.md").read_text()
    assert ours == online.files("me/model")["README.md"].decode()
    own = "---\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(own)
    push_to_hub(folder, "me/model", token=hub_server.TOKEN)
    assert online.files("me/model")["README.md"].decode() == own == (folder / "README.md").read_text()
    (folder / "README.md").write_text("---\nbase_model: not an id\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push_to_hub(folder, "me/model", token=hub_server.TOKEN)


def test_a_plain_training_loop_needs_no_hub(tmp_path):
    """`create_model_card` offline, and no card while the model is not there yet."""
    trainer = trainer_for(tmp_path, LpDecayConfig(p=0.5, target_sparsity=0.5))
    trainer.is_in_train = True
    trainer.create_model_card()
    assert not list(tmp_path.iterdir())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="A model", license="mit", tasks="text-generation")
    assert "# A model\n" in (tmp_path / "README.md").read_text()
    with pytest.raises(TypeError, match="create_model_card got licence, but takes language, license"):
        trainer.create_model_card(licence="mit")
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer.model).values(), trainer.model.parameters()))


@pytest.mark.parametrize("packed", [True, "only"])
def test_an_archive_beside_or_instead_of_the_dense_weights(online, folder, tmp_path, monkeypatch, packed):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    said = push_to_hub(folder, "me/packed", token=hub_server.TOKEN, packed=packed, dry_run=True)
    pushed = push_to_hub(folder, "me/packed", token=hub_server.TOKEN, packed=packed)
    assert set(said.files) == set(pushed.files) and "packed/archive.json" in pushed.files
    assert ("model.safetensors" in pushed.files) == (packed is True)
    assert not any("optimizer" in name or "hidden" in name for name in pushed.files)
    assert 'load_sparse("me/packed")' in (folder / "README.md").read_text()
    model = load_sparse("me/packed", token=hub_server.TOKEN)
    expected = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    with pytest.raises(ValueError, match="Invalid packed='x'"):
        push_to_hub(folder, "me/packed", packed="x")
