"""Both forms of one search, and proofs of finished deltas: damage never passes."""

from __future__ import annotations

import gzip
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from obdelta.delta.apply import prove_layer
from obdelta.delta.build import Effort, LayerBuilder, Progress, build_layer
from obdelta.delta.compress import TailFile
from obdelta.errors import ProofFailed
from obdelta.oci import DiffID, Form
from tests.support.delta import build, layer_file, tar_in
from tests.support.releases import program, releases


@pytest.mark.parametrize("effort", Effort)
def test_zstd_is_one_frame_that_costs_an_engine_little_memory(effort: Effort) -> None:
    """The frame declares its size, a window of 2 MiB at most, and a checksum."""
    rng = random.Random(15)
    for size in (100, 3_000_000):
        made = build([b""], rng.randbytes(size), form=Form.ZSTD, effort=effort)
        frame = zstandard.get_frame_parameters(made.blob)
        assert frame.content_size == made.layer.tar_size == len(tar_in(made.blob))
        assert frame.window_size <= 2 * 1024 * 1024 and frame.has_checksum
        decoder = zstandard.ZstdDecompressor().decompressobj()
        decoder.decompress(made.blob)
        assert decoder.eof and decoder.unused_data == b""


def test_the_number_of_threads_changes_no_byte_of_zstd() -> None:
    """Makes several jobs of zstd, of 8 MB each."""
    rng = random.Random(16)
    target = b"".join(program(rng, 6_000) + rng.randbytes(2_000) for _ in range(3_000))
    made = {
        build([b""], target, form=Form.ZSTD, effort=Effort.FAST, threads=threads).blob
        for threads in (1, 2, 3)
    }
    assert len(made) == 1


def test_one_search_serves_both_forms(tmp_path: Path) -> None:
    base, target = releases(17, 20)
    layers = [layer_file(content, tmp_path) for content in base]
    outs = {form: tmp_path / form.value for form in Form}
    seen: list[Progress] = []
    with LayerBuilder(layers, threads=2) as builder:
        for wanted in (layer_file(target, tmp_path), layers[0].diff_id):
            made = builder.build(wanted, outs, seen.append)
            for form, layer in made.items():
                alone = build_layer(layers, wanted, tmp_path / "alone", form=form)
                assert (layer.digest, layer.size) == (alone.digest, alone.size)
                assert outs[form].read_bytes() == (tmp_path / "alone").read_bytes()
                assert layer.explained is None or layer.explained == alone.explained
    assert {made[form].diff_id for form in Form} == {made[Form.GZIP].diff_id}
    matched = [step for step in seen if (step.stage, step.done) == ("match", len(target))]
    assert len(matched) == 1


@pytest.mark.parametrize("failing", Form)
def test_a_failure_of_one_form_fails_the_other(failing: Form, tmp_path: Path) -> None:
    base, target = releases(18, 10)
    layers = [layer_file(content, tmp_path) for content in base]
    outs = {form: tmp_path / form.value for form in Form}
    outs[failing].symlink_to("/dev/full")
    with LayerBuilder(layers) as builder, pytest.raises(OSError, match="No space left"):
        builder.build(layer_file(target, tmp_path), outs)
    assert not any(out.exists() or out.is_symlink() for out in outs.values())


def test_a_target_with_a_wrong_digest_fails_its_proof(tmp_path: Path) -> None:
    base, target = releases(9, 10)
    layers = [layer_file(content, tmp_path) for content in base]
    lying = layer_file(target, tmp_path)._replace(diff_id=DiffID.of(b"something else"))
    with pytest.raises(ProofFailed, match="it leads to"):
        build_layer(layers, lying, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damaged(blob: bytes) -> list[bytes]:
    tar = bytearray(gzip.decompress(blob))
    flipped = tar[:]
    flipped[600] ^= 1
    renamed = tar[:]
    renamed[:5] = b"delts"
    renamed[148:156] = b"%06o\0 " % (sum(renamed[:512]) - sum(renamed[148:156]) + 8 * 32)
    return [
        blob[:-9],
        blob + b"x",
        gzip.compress(bytes(flipped)),
        gzip.compress(bytes(renamed)),
        gzip.compress(bytes(tar[:-1])),
        gzip.compress(bytes(tar) + bytes(512)),
        gzip.compress(bytes(tar[:700])),
        b"",
    ]


@pytest.mark.parametrize("number", range(8))
def test_damaged_blobs_fail_their_proof(number: int, tmp_path: Path) -> None:
    base, target = releases(10, 10)
    blob = build(base, target).blob
    layers = [layer_file(content, tmp_path) for content in base]
    path = tmp_path / "blob"
    path.write_bytes(blob)
    prove_layer(layers, path, DiffID.of(target))
    path.write_bytes(damaged(blob)[number])
    with pytest.raises(ProofFailed):
        prove_layer(layers, path, DiffID.of(target))


def test_damaged_zstd_fails_its_proof(tmp_path: Path) -> None:
    base, target = releases(10, 10)
    blob = build(base, target, form=Form.ZSTD).blob
    layers = [layer_file(content, tmp_path) for content in base]
    path = tmp_path / "blob"
    path.write_bytes(blob)
    prove_layer(layers, path, DiffID.of(target))
    flipped = bytearray(blob)
    flipped[-1] ^= 1  # the checksum
    for bad in (blob[:-9], blob + b"x", bytes(flipped), blob[: len(blob) // 2]):
        path.write_bytes(bad)
        with pytest.raises(ProofFailed):
            prove_layer(layers, path, DiffID.of(target))


def test_a_file_that_is_read_while_it_is_written(tmp_path: Path) -> None:
    rng = random.Random(13)
    pieces = [rng.randbytes(rng.choice([0, 1, 1000, 300_000])) for _ in range(60)]
    with TailFile(tmp_path / "piped") as file, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(
            lambda: b"".join(iter(lambda: file.read(rng.choice([1, 4000, 1 << 20])), b""))
        )
        for piece in pieces:
            file.write(piece)
        file.end()
        assert reading.result() == b"".join(pieces) == (tmp_path / "piped").read_bytes()
        assert file.read(1) == b""


def test_a_full_disk_ends_the_proof_too(tmp_path: Path) -> None:
    """A failed write fails the build, and nothing waits for the rest."""
    base, target = releases(14, 10)
    layers = [layer_file(content, tmp_path) for content in base]
    out = tmp_path / "out"
    out.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        build_layer(layers, layer_file(target, tmp_path), out)
    assert not out.is_symlink()


def test_a_delta_is_not_larger_than_that_of_rdiff(tmp_path: Path) -> None:
    """gzip on both, as a device would load it."""
    base, target = releases(11, 60)
    for name, content in (("base", b"".join(base)), ("target", target)):
        (tmp_path / name).write_bytes(content)
    signature, delta = tmp_path / "signature", tmp_path / "delta"
    subprocess.run(
        ["rdiff", "-b", "512", "-S", "32", "signature", tmp_path / "base", signature], check=True
    )
    subprocess.run(["rdiff", "delta", signature, tmp_path / "target", delta], check=True)
    gzip_size = len(subprocess.run(["gzip", "-6c", delta], capture_output=True, check=True).stdout)
    for effort in Effort:
        ours = subprocess.run(
            ["gzip", "-6c"],
            input=build(base, target, price=0, effort=effort).stream,
            capture_output=True,
            check=True,
        )
        assert len(ours.stdout) < 0.6 * gzip_size
