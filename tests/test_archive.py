"""The archive: every byte comes back, and nothing else is believed."""

import base64
import filecmp
import json
import shutil
import struct

import benchmark_archive
import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_lpdecay import cli, pack, unpack
from hf_lpdecay.artifacts import archive as module
from hf_lpdecay.artifacts import stored
from hf_lpdecay.artifacts.codec import decode, encode


pytest.importorskip("zstandard")


@pytest.mark.parametrize("density", [0.0001, 0.003, 0.05, 0.07, 0.999])
def test_many_entries_come_back_at_any_density(density):
    generator = np.random.default_rng(0)
    words = generator.integers(1, 1 << 16, 100_000, dtype=np.uint16)
    words[generator.random(100_000) > density] = 0
    data = words.tobytes()
    assert decode(encode(data, 2, True), len(words), 2, True) == data


@given(
    values=st.lists(st.one_of(st.just(0), st.integers(0, 2**64 - 1)), max_size=200),
    size=st.sampled_from([1, 2, 4, 8]),
    is_float=st.booleans(),
)
def test_any_bits_come_back(values, size, is_float):
    data = b"".join((value % 2 ** (8 * size)).to_bytes(size, "little") for value in values)
    assert decode(encode(data, size, is_float), len(values), size, is_float) == data


@pytest.mark.parametrize("sparsity, most", [(0.5, 0.42), (0.8, 0.19), (0.9, 0.105), (0.99, 0.016)])
def test_it_is_within_a_tenth_of_what_is_possible(sparsity, most):
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(1 << 20, generator=generator) * 0.05).to(torch.bfloat16)
    weights[torch.rand(1 << 20, generator=generator) < sparsity] = 0.0
    data = weights.view(torch.int16).numpy().tobytes()
    packed = sum(map(len, encode(data, 2, True).parts)) / len(data)
    words = np.frombuffer(data, np.uint16)
    share = np.bincount(words[words != 0], minlength=1 << 16) / np.count_nonzero(words)
    share, p = share[share > 0], np.count_nonzero(words) / len(words)
    bound = (-p * np.log2(p) - (1 - p) * np.log2(1 - p) - p * (share * np.log2(share)).sum()) / 16
    assert packed < most and packed < (1.1 if sparsity < 0.95 else 1.2) * bound


def write_model(folder, **options):
    """A sharded sparse model with everything that a tensor can be."""
    model = tiny_llama().to(torch.bfloat16)
    for param in model.parameters():
        if param.ndim == 2:
            param.data.view(-1)[torch.rand(param.numel()) < 0.8] = 0.0
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    return model


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def same_files(a, b):
    names = files(a)
    assert names == files(b)
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


@pytest.mark.parametrize("piece", [1000, 1 << 22])
@pytest.mark.parametrize("shard_bytes", [2000, 1 << 30])
def test_every_file_comes_back_byte_for_byte(tmp_path, monkeypatch, piece, shard_bytes):
    monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setattr(stored, "SHARD_BYTES", shard_bytes)
    write_model(tmp_path / "model", max_shard_size="30kB")
    result = pack(tmp_path / "model", tmp_path / "packed")
    assert result["packed_bytes"] < result["dense_bytes"]
    assert len(list((tmp_path / "packed").glob("packed-*"))) == (1 if shard_bytes > 2000 else 4)
    with pytest.raises(OSError, match=r"o such file|no file named"):  # not silently a model with random weights
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert same_files(tmp_path / "model", tmp_path / "again")


def test_every_type_shape_and_bit_pattern_comes_back(tmp_path):
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45])
    tensors = {
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(3.5),
        "special": torch.cat([special, special.view(torch.int32).add(1).view(torch.float32)]),
        "double": torch.randn(7, 3, dtype=torch.float64),
        "half": torch.randn(9).half(),
        "int": torch.randint(-5, 5, (11,)),
        "bool": torch.rand(13) < 0.5,
        "fp8": torch.randn(17).to(torch.float8_e4m3fn),
        "fnuz": torch.randn(17).to(torch.float8_e4m3fnuz),
        "complex": torch.randn(5, dtype=torch.complex64),
        "zeros": torch.zeros(1000),
    }
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt", "b": "ä", "a": "1"})
    pack(tmp_path / "model", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert same_files(tmp_path / "model", tmp_path / "again")


def test_every_file_is_kept_but_a_trainers_checkpoints(tmp_path):
    model = tmp_path / "model"
    write_model(model)
    for name in ("training_args.bin", ".gitattributes", "notes (1).txt", "original/params.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    save_file({"a": torch.zeros(1000)}, model / "original" / "more.safetensors")
    (tmp_path / "blob").write_text("in the hub's cache")
    (model / "README.md").symlink_to(tmp_path / "blob")
    expected = files(model)
    (model / "checkpoint-10").mkdir()
    (model / "checkpoint-10" / "optimizer.pt").write_bytes(b"\x80")
    pack(model, tmp_path / "packed")
    assert not [name for name in files(tmp_path / "packed") if "more" in name]
    unpack(tmp_path / "packed", tmp_path / "again")
    shutil.rmtree(model / "checkpoint-10")
    assert "README.md" in expected and same_files(model, tmp_path / "again")


def test_dense_weights_do_not_grow(tmp_path):
    (tmp_path / "model").mkdir()
    noise = torch.randint(1, 256, (1 << 20,), dtype=torch.uint8)
    save_file({"noise": noise}, tmp_path / "model" / "model.safetensors")
    result = pack(tmp_path / "model", tmp_path / "packed")
    assert result["packed_bytes"] < 1.01 * result["dense_bytes"]


def damage_manifest(signed=True, **changes):
    """Change the manifest; `signed` as somebody would who means it."""

    def damage(folder):
        path = folder / "archive.json"
        manifest = json.loads(path.read_text())
        for where, value in changes.items():
            *keys, last = [int(key) if key.isdigit() else key for key in where.split("__")]
            target = manifest if where == "version" else manifest["content"]
            for key in keys:
                target = target[key]
            target[last] = value(target[last]) if callable(value) else value
        if signed:
            manifest["sha256"] = module._digest(manifest["content"])
        path.write_text(json.dumps(manifest))

    return damage


def flip(folder):
    path = next(folder.glob("packed-*"))
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def huge(encoded):
    header = json.loads(base64.b64decode(encoded)[8:])
    position = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1 << 60 if position == 0 else entry["data_offsets"][1] - entry["data_offsets"][0]
            entry.update(dtype="U8", shape=[count], data_offsets=[position, position + count])
            position += count
    text = json.dumps(header).encode()
    return base64.b64encode(struct.pack("<Q", len(text)) + text).decode()


FIRST = "files__0__tensors__0__"
DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda folder: next(folder.glob("packed-*")).write_bytes(
        next(folder.glob("packed-*")).read_bytes()[:-9]
    ),
    "no json": lambda folder: (folder / "archive.json").write_text("{"),
    "not a dict": lambda folder: (folder / "archive.json").write_text("[]"),
    "version": damage_manifest(version=2),
    "nested too deep": lambda folder: (folder / "archive.json").write_text("[" * 100_000),
    "not signed": damage_manifest(signed=False, files__0__name="other.safetensors"),
    "another config": lambda folder: (folder / "config.json").write_text("{}"),
    "path traversal": damage_manifest(files__0__name="../../evil.safetensors"),
    "absolute path": damage_manifest(others=lambda others: [{"name": "/etc/passwd", "sha256": ""}, *others]),
    "shard elsewhere": damage_manifest(shards=["../model/model.safetensors"]),
    "symlink": lambda folder: [
        (folder / "tokenizer.json").unlink(),
        (folder / "tokenizer.json").symlink_to("/etc/passwd"),
    ],
    "size bomb": damage_manifest(files__0__header=huge),
    "more values than entries": damage_manifest(**{f"{FIRST}pieces__0__0": 10**9}),
    "mask disagrees": damage_manifest(**{f"{FIRST}pieces__0__0": lambda nonzeros: nonzeros - 1}),
    "negative length": damage_manifest(**{f"{FIRST}pieces__0__1": -1}),
    "missing piece": damage_manifest(**{f"{FIRST}pieces": []}),
    "missing tensor": damage_manifest(files__0__tensors=lambda tensors: tensors[:-1]),
    "another tensor": damage_manifest(**{f"{FIRST}key": "nowhere"}),
    "another shard": damage_manifest(**{f"{FIRST}shard": "nowhere"}),
    "checksum": damage_manifest(**{f"{FIRST}sha256": "0" * 64}),
    "header": damage_manifest(files__0__header="AAAA"),
    "a name twice": damage_manifest(others=lambda others: [*others, others[0]]),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    write_model(folder / "model")
    pack(folder / "model", folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_or_hostile_is_refused_and_nothing_is_written(packed, tmp_path, kind, capsys):
    shutil.copytree(packed, tmp_path / "packed")
    DAMAGE[kind](tmp_path / "packed")
    with pytest.raises(ValueError, match=r"cannot be unpacked: .* Nothing was written"):
        unpack(tmp_path / "packed", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert cli.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "out")]) == 2
    assert "lpdecay unpack: error: The archive" in capsys.readouterr().err


def test_interrupting_leaves_nothing(packed, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_unpack_tensors", interrupt)
    assert cli.main(["unpack", str(packed), str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == [] and "Interrupted" in capsys.readouterr().err


def test_what_cannot_be_packed_is_refused(tmp_path, capsys):
    write_model(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*never read: save the model as safetensors"):
        pack(tmp_path / "model", tmp_path / "packed")
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    assert cli.main(["pack", str(tmp_path / "model"), str(tmp_path / "packed")]) == 0
    assert "bytes of weights, now" in capsys.readouterr().out
    assert cli.main(["pack", str(tmp_path / "model"), str(tmp_path / "packed")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name a folder elsewhere"):
        pack(tmp_path / "model", tmp_path / "model" / "packed")
    (tmp_path / "model" / "model.safetensors").write_bytes(b'\x11\0\0\0\0\0\0\0{"a":{"shape":1}}')
    with pytest.raises(ValueError, match="save the model again"):
        pack(tmp_path / "model", tmp_path / "again")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        pack(tmp_path, tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "model", tmp_path / "x")


def test_the_benchmark_packs_what_it_prunes(language_model, tmp_path, capsys):
    flags = ["--sparsity", "0.9", "0.5", "--results_file", str(tmp_path / "results.json")]
    assert benchmark_archive.main([str(language_model), *flags]) == 0
    half, most = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (half["sparsity"], most["sparsity"]) == (0.5, 0.9) and most["linear"]["bound"] < half["linear"]["bound"]
    assert (
        most["linear"]["share"] < half["linear"]["share"] < 1
        and half["linear"]["dense_bytes"] < half["whole"]["dense_bytes"]
    )
    assert "| 50% | " in capsys.readouterr().out
    assert benchmark_archive.entropy(torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(4 * 1.5)
    assert benchmark_archive.main([str(language_model), "--sparsity", "1.5"]) == 2
    assert "sparsity=1.5: should be in [0, 1)" in capsys.readouterr().err
