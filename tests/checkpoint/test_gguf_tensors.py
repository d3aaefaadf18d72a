"""Tensors of a GGUF: what is made of a checkpoint's comes out of it again, and as what each is written."""

import pytest
import torch

from optimum_dsa.checkpoint.exports import export
from optimum_dsa.checkpoint.gguf_tensors import Part, kind_of

from .engine import family, save


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        (Part("a", (8, 6), ("a",)), (8, 6)),
        (Part("a", (8, 6), ("a",), heads=2), (8, 6)),
        (Part("a", (8,), ("a",), heads=2), (8,)),
        (Part("a", (6, 8), ("a",), transposed=True), (8, 6)),
        (Part("a", (8,), ("a",), lift=1.0), (8,)),
        (Part("a", (3, 8, 6), ("a", "b", "c")), (8, 6)),
    ],
)
def test_what_is_made_comes_out_again(part, shape):
    tensors = [torch.randint(-9, 9, shape).float() for _ in part.names]
    made = part.make(tensors)
    assert tuple(made.shape) == part.shape
    assert all(torch.equal(one, other) for one, other in zip(part.undo(made), tensors, strict=True))
    assert made.equal(tensors[0]) == (part == Part("a", (8, 6), ("a",)))


def test_matrices_alone_have_few_bits():
    last, embedding = Part("output.weight", (9, 64), ()), Part("token_embd.weight", (9, 64), ())
    both, tied = ("output.weight", "token_embd.weight"), ("token_embd.weight",)
    assert [kind_of(one, "q4_0", both) for one in (last, embedding)] == ["q8_0", "q4_0"]
    assert kind_of(embedding, "q4_0", tied) == "q8_0" and kind_of(embedding, "f16", tied) == "f16"
    assert kind_of(Part("blk.0.ffn_down.weight", (9, 33), ()), "q8_0", both) == "f16"
    for name, shape in (("blk.0.attn_norm.weight", (64,)), ("position_embd.weight", (9, 64))):
        assert kind_of(Part(name, shape, ()), "q4_0", both) == "f32"
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.attn_q_norm.weight"):
        assert kind_of(Part(name, (2, 64), ()), "q8_0", both) == "f32"


def test_rows_that_do_not_divide_stay_wider(tmp_path, caplog):
    gguf = pytest.importorskip("gguf")
    folder = save(family("qwen3", intermediate_size=40), tmp_path / "model")
    export(folder, tmp_path / "out.gguf", "gguf", "q4_0")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q4_0" and kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q_norm.weight"] == "F32"
    assert "2 matrices stay float16, as their rows do not divide by 32" in caplog.text and "(40)" in caplog.text
