import torch

from optimum_dsa.common.frame import Frame, frame_of

from ..tiny import bos_tokenizer, masking_tokenizer, tokens


def test_a_frame_is_what_the_tokenizer_adds():
    assert frame_of(masking_tokenizer()) == Frame((1,), (2,))
    assert frame_of(bos_tokenizer()) == Frame((0,)) and frame_of(bos_tokenizer(adds=False)) == Frame()


def test_windows_in_a_frame_hold_it_and_the_text():
    windows = tokens(3, 5)
    framed = Frame((1, 2), (3,)).around(windows)
    assert framed.shape == (3, 8) and framed.dtype == torch.int64
    assert framed[:, :2].tolist() == [[1, 2]] * 3 and framed[:, -1].tolist() == [3] * 3
    assert torch.equal(framed[:, 2:-1], windows) and torch.equal(Frame().around(windows), windows)
    assert len(Frame((1, 2), (3,))) == 3 and not Frame()


def test_a_tokenizer_whose_text_changes_with_the_frame_has_none():
    class Odd:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [7, 8] if add_special_tokens else [9]}

    assert frame_of(Odd()) == Frame()
