import pytest
import torch

from pico_hf.kernels import late_interaction
from pico_hf.kernels.late_interaction import Block, Matches, interact, working_type
from pico_hf.kernels.packing import Packing


def pack(*features):
    return [Packing(torch.ones(f.shape[:2], dtype=torch.bool)) for f in features]


def matches_of(images, texts):
    packings = pack(images, texts)
    matches = Matches.empty(*packings)
    interact(images, texts, *packings, matches=matches)
    return matches


def test_the_first_of_tied_tokens_is_kept():
    images = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    texts = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    matches = matches_of(images, texts)
    assert matches.words.tolist() == [[2, 2, 0]]
    assert matches.patches.tolist() == [[2, 2, 0, 0]]


def test_positions_equal_those_of_torch_argmax():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 7, 4, generator=generator)
    texts = torch.randn(5, 6, 4, generator=generator)
    products = torch.einsum("ipd,twd->itpw", images, texts)
    matches = matches_of(images, texts)
    assert torch.equal(matches.words.long(), products.argmax(3).transpose(0, 1).flatten(1))
    assert torch.equal(matches.patches.long(), products.argmax(2).flatten(1))


@pytest.mark.parametrize(
    ("length", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15 + 1, torch.int32)]
)
def test_positions_take_the_smallest_integers_that_hold_them(length, dtype):
    images, texts = torch.zeros(1, length, 1), torch.zeros(1, 2, 1)
    assert Matches.empty(*pack(images, texts)).patches.dtype == dtype


def test_a_token_of_nan_yields_a_position_inside_its_item():
    images, texts = torch.ones(2, 3, 2), torch.ones(2, 4, 2)
    images[0, 1] = torch.nan
    matches = matches_of(images, texts)
    assert matches.words.max() < 4
    assert matches.patches.max() < 3


def test_no_tensor_exceeds_the_block_budget(monkeypatch):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(late_interaction, "BLOCK_ELEMENTS", 400)
    monkeypatch.setattr(late_interaction, "BLOCK_PATCHES", 20)
    images, texts = torch.randn(30, 10, 2), torch.randn(40, 5, 2)
    packings = pack(images, texts)
    with Largest() as largest:
        interact(images, texts, *packings)
    assert largest.elements == 30 * 40  # the scores; all products together would be 60,000


def test_a_block_fits_tiles_of_its_shape_only():
    images, texts = pack(torch.ones(3, 2, 4), torch.ones(2, 3, 4))
    (chunk,) = texts.chunks(max_rows=6)
    first, last = images.runs(max_rows=4)
    block = Block(torch.ones(6, 4), chunk, first, indexed=False)
    assert block.fits(first)
    assert not block.fits(last)


def test_half_precision_is_scored_in_float32_and_float64_stays():
    half, single, double = (
        torch.zeros(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    assert working_type(half, half) == torch.float32
    assert working_type(single, double) == torch.float64
