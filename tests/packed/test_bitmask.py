import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.packed.bitmask import (
    CHUNK,
    DIMENSIONS,
    LARGEST,
    MAGIC,
    TYPES,
    can_pack,
    is_packed,
    pack,
    read_header,
    unpack,
)


def sparse(shape, share, dtype=torch.bfloat16, seed=0):
    """Normal weights of which about `share` are zero; none of the others is."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator).abs().add(0.1).to(dtype)
    return weights.masked_fill(torch.rand(shape, generator=generator) < share, 0)


def header_of(packed):
    return read_header(packed.numpy().tobytes(), packed.numel())


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 99),
)
def test_what_is_unpacked_is_what_was_packed(shape, share, dtype, seed):
    weights = sparse(shape, share, dtype, seed)
    packed = pack(weights)
    if packed is None:
        header = 8 * (4 + len(shape))
        assert header + weights.numel() // 8 + int((weights != 0).sum()) * dtype.itemsize + 24 >= weights.nbytes
        return
    assert packed.numel() % 8 == 0 and packed.numel() < weights.nbytes
    again = unpack(packed)
    assert again.shape == weights.shape and again.dtype == dtype and torch.equal(bits(again), bits(weights))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_sizes_around_a_chunk(dtype, size):
    weights = sparse(size, 0.6, dtype)
    assert torch.equal(bits(unpack(pack(weights))), bits(weights))


def test_every_bit_pattern_survives():
    weights = torch.zeros(4 * 2**16, dtype=torch.int16)
    weights[::4] = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):  # -0.0, NaN with payloads, infinities, subnormals
        assert torch.equal(unpack(pack(weights.view(dtype))).view(torch.int16), weights)


def test_empty_and_full_masks():
    zeros = torch.zeros(64, 64)
    packed = pack(zeros)
    assert packed.numel() == 48 + 64 * 64 // 8
    assert torch.equal(unpack(packed), zeros)
    assert pack(torch.ones(64, 64)) is None
    assert pack(torch.tensor(0.0)) is None and pack(torch.zeros(64, 64, dtype=torch.int32)) is None


def test_a_transposed_tensor_keeps_its_shape():
    weights = sparse((40, 24), 0.7).t()
    assert torch.equal(unpack(pack(weights)), weights)


@pytest.mark.parametrize("share,limit", [(0.5, 0.57), (0.6, 0.47), (0.7, 0.37)])
def test_bfloat16_shrinks_as_promised(share, limit):
    weights = sparse((512, 512), share)
    assert pack(weights).numel() <= limit * weights.nbytes


def test_damage_is_refused_by_name():
    weights = sparse((64, 64), 0.5)
    good = pack(weights)

    def with_fact(place, value):
        bad = good.clone()
        bad[: 8 * 6].view(torch.int64)[place] = value
        return bad

    for place, value in [
        (1, 99),
        (1, len(TYPES)),
        (1, -1),
        (2, -1),
        (2, 10**9),
        (3, 0),
        (3, 99),
        (4, 2**40),
        (4, -64),
        (5, 2**62),
    ]:
        with pytest.raises(ValueError, match="w is damaged"):
            unpack(with_fact(place, value), "w")
    with pytest.raises(ValueError, match="w is damaged"):
        unpack(good[:-8], "w")
    flipped = good.clone()
    flipped[48] ^= 1
    with pytest.raises(ValueError, match="w is damaged: its mask keeps"):
        unpack(flipped, "w")
    with pytest.raises(ValueError, match="is no packed tensor"):
        unpack(torch.zeros(100, dtype=torch.uint8))
    assert read_header(bytes(96), 96) is None and read_header(b"", 0) is None
    assert int(good[:8].view(torch.int64)) == MAGIC


def test_bits_beyond_the_last_weight_are_refused():
    packed = pack(torch.zeros(101))
    header = header_of(packed)
    packed[header.mask.stop - 1] = 0x80
    packed[:40].view(torch.int64)[2] = 1
    with pytest.raises(ValueError, match="is damaged"):
        unpack(packed)


def test_a_packed_tensor_is_known_by_its_mark():
    packed = pack(torch.zeros(64, 64))
    assert is_packed(packed) and is_packed(pack(torch.zeros(300)))
    assert not is_packed(packed[:39]) and not is_packed(packed[:, None]) and not is_packed(packed.view(torch.int64))
    assert not is_packed(torch.zeros(100, dtype=torch.uint8)) and not is_packed(torch.zeros(64, 64))
    assert not is_packed(packed.roll(1))


def test_what_can_be_packed_has_a_type_and_one_to_eight_dimensions():
    assert all(can_pack(dtype, (4, 4)) for dtype in TYPES) and not can_pack(torch.int32, (4, 4))
    assert can_pack(torch.float32, (1,) * DIMENSIONS) and not can_pack(torch.float32, (1,) * (DIMENSIONS + 1))
    assert can_pack(torch.float32, (1,)) and not can_pack(torch.float32, ())
    weights = sparse((2, 1, 3, 1, 4, 2, 2, 30), 0.8, torch.float32)
    packed = pack(weights)
    assert header_of(packed).mask.start == LARGEST and torch.equal(unpack(packed), weights)


@pytest.mark.parametrize(
    "dtype,width", [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)]
)
def test_the_parts_lie_where_the_table_says(dtype, width):
    weights = sparse((10, 31), 0.7, dtype)
    kept = int((weights != 0).sum())
    header = header_of(pack(weights))
    assert (header.dtype, header.shape, header.kept, header.size) == (dtype, (10, 31), kept, 310)
    assert (header.mask, header.values) == (slice(48, 48 + 39), slice(88, 88 + kept * width))
    assert header.bytes == pack(weights).numel() == 88 + -(-kept * width // 8) * 8


def test_an_empty_tensor_has_an_empty_mask():
    assert read_header(pack(torch.zeros(64)).numpy().tobytes(), 48).kept == 0
    assert pack(torch.zeros(0, 4)) is None
