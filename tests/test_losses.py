import jaxtyping
import pytest
import torch

from pico_hf.core.losses import LOSSES, hinge_loss, info_nce_loss, sigmoid_loss
from reference import hinge_loop, info_nce_loop, sigmoid_loop

DISTINCT = [0, 1, 2, 3, 4]
SHARED = [0, 1, 0, 2, 1]  # pairs 0 and 2 show one image, 1 and 4 another
LOOPS = {
    "hinge": lambda scores, ids: hinge_loop(scores, ids, margin=0.2),
    "infonce": info_nce_loop,
    "sigmoid": sigmoid_loop,
}

every_loss = pytest.mark.parametrize("name", sorted(LOSSES))


@pytest.fixture
def scores():
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unchecked_shapes():
    """As for a user, who runs without the shape checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@every_loss
@pytest.mark.parametrize("ids", [DISTINCT, SHARED])
def test_each_loss_equals_its_loop(name, ids, scores):
    loss = LOSSES[name](scores, torch.tensor(ids))
    assert loss.item() == pytest.approx(LOOPS[name](scores, ids), rel=1e-5)


@pytest.mark.parametrize("ids", [DISTINCT, SHARED])
@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_the_warm_up_equals_its_loop_over_all_negatives(ramp, ids, scores):
    loss = hinge_loss(scores, torch.tensor(ids), margin=0.5, ramp=ramp)
    assert loss.item() == pytest.approx(hinge_loop(scores, ids, 0.5, ramp), rel=1e-5)


# With margin ½ the rows cost [[0, 0, .25], [.75, 0, .5], [.75, .25, 0]] over the diagonal's
# (1, .5, .5), and the columns [[0, .25, .75], [.25, 0, .5], [.25, .25, 0]].
TABLE = torch.tensor([[1.0, 0.25, 0.75], [0.75, 0.5, 0.5], [0.75, 0.25, 0.5]])


def test_hardest_negatives_equal_the_hand_table():
    assert hinge_loss(TABLE, margin=0.5).item() == 0.25 + 0.75 + 0.75 + 0.25 + 0.25 + 0.75


def test_all_negatives_equal_the_hand_table():
    assert hinge_loss(TABLE, margin=0.5, ramp=1.0).item() == 2.5 + 2.25
    assert hinge_loss(TABLE, margin=0.5, ramp=0.5).item() == 0.5 * (2.5 + 2.25)


def test_pairs_of_the_same_image_equal_the_hand_table():
    ids = torch.tensor([7, 7, 8])  # [0, 1] and [1, 0] drop out
    assert hinge_loss(TABLE, ids, margin=0.5).item() == 0.25 + 0.5 + 0.75 + 0.25 + 0.25 + 0.75


def test_info_nce_of_indifferent_scores_is_the_log_of_the_batch():
    assert info_nce_loss(torch.zeros(8, 8)).item() == pytest.approx(2.0794415)  # ln 8


def test_info_nce_of_a_certain_model_is_zero_and_does_not_overflow():
    assert info_nce_loss(1e4 * torch.eye(4)).item() == 0.0


def test_sigmoid_loss_of_a_certain_model_is_zero_and_does_not_overflow():
    assert sigmoid_loss(1e4 * (2 * torch.eye(4) - 1)).item() == 0.0


@every_loss
def test_reordering_the_pairs_changes_no_loss(name, scores):
    order, ids = torch.tensor([3, 0, 4, 1, 2]), torch.tensor(SHARED)
    moved = LOSSES[name](scores[order][:, order], ids[order])
    torch.testing.assert_close(moved, LOSSES[name](scores, ids))


@every_loss
def test_swapping_images_and_texts_changes_no_loss(name, scores):
    torch.testing.assert_close(LOSSES[name](scores.T), LOSSES[name](scores))


@every_loss
def test_scores_of_the_same_image_never_matter(name, scores):
    ids = torch.tensor(SHARED)
    same = (ids.unsqueeze(1) == ids.unsqueeze(0)) & ~torch.eye(5, dtype=torch.bool)
    loud = scores.masked_fill(same, 100.0).requires_grad_()
    loss = LOSSES[name](loud, ids)
    torch.testing.assert_close(loss, LOSSES[name](scores, ids))
    (gradient,) = torch.autograd.grad(loss, loud)
    assert gradient[same].tolist() == [0.0] * 4
    assert gradient[~same].abs().sum() > 0


@pytest.mark.parametrize("ramp", [None, 1.0])
def test_a_batch_of_one_image_has_no_negative_and_no_hinge_loss(ramp, scores):
    assert hinge_loss(scores, torch.zeros(5, dtype=torch.long), ramp=ramp).item() == 0.0


def test_a_batch_of_one_image_has_no_negative_and_no_info_nce_loss(scores):
    scores.requires_grad_()
    loss = info_nce_loss(scores, torch.zeros(5, dtype=torch.long))
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_only_the_hardest_negatives_get_gradient():
    scores = TABLE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(hinge_loss(scores, margin=0.5), scores)
    # rows choose [0,2] [1,0] [2,0]; columns [1,0]/[2,0] (a tie), [0,1]/[2,1] (a tie) and [0,2]
    assert gradient.diagonal().tolist() == [-2.0, -2.0, -2.0]
    assert gradient[0, 2] == 2.0
    assert gradient[1, 2] == 0.0
    assert gradient.sum() == 0.0


@every_loss
def test_half_precision_scores_give_the_loss_in_single_precision(name, scores):
    half = scores.bfloat16()
    loss = LOSSES[name](half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](half.float()))


@every_loss
def test_gradients_are_those_of_the_differences(name, scores):
    exact = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], (exact, torch.tensor(SHARED)))


@every_loss
def test_a_batch_of_one_is_refused(name):
    message = r"contrastive loss needs at least 2 pairs, got 1\. Take larger batches"
    with pytest.raises(ValueError, match=message):
        LOSSES[name](torch.ones(1, 1))


@every_loss
def test_more_texts_than_images_are_refused(name):
    with pytest.raises(ValueError, match="as many texts as images, got 2 images and 3 texts"):
        LOSSES[name](torch.randn(2, 3))


@every_loss
def test_ids_of_another_length_are_refused(name, scores, unchecked_shapes):
    with pytest.raises(ValueError, match=r"`image_ids` must name the image of each of the 5 pairs"):
        LOSSES[name](scores, torch.tensor([0]))
