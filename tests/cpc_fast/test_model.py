"""The flow from images to losses: shapes, geometry, and that nothing can be seen that should not be."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import TINY_CONFIG, texture

from cpc_fast import train as module
from cpc_fast.bank import bank_losses
from cpc_fast.config import PRESETS, Config, preset
from cpc_fast.contexts import DIRECTIONS, ContextNet
from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.latents import ResidualBlock
from cpc_fast.loss import accuracy, cpc_loss
from cpc_fast.model import CPC
from cpc_fast.patches import extract_patches, grid_shape, jittered, patch_places, patch_starts
from cpc_fast.predictions import Predictions, Predictor, geometry
from cpc_fast.scoring import Scorer, patch_medians
from cpc_fast.train import average_weights, convolutions, guessing, make_batch
from cpc_kernels import Negatives, draw_negatives, reference

SMALL = Config(width=8, stem=4, patch_size=16, patch_stride=8, steps=2)


def test_patches_are_windows_of_the_image():
    images = torch.arange(2 * 48 * 40.0).view(2, 1, 48, 40)
    patches = extract_patches(images, 16, 8)
    assert patches.shape == (2, 5, 4, 1, 16, 16)
    assert torch.equal(patches[1, 2, 3, 0], images[1, 0, 16:32, 24:40])


@pytest.mark.parametrize(("size", "stride"), [(16, 8), (16, 16), (7, 3), (5, 1)])
def test_patches_reach_from_edge_to_edge(size, stride):
    """Every pixel is in a patch, all patches lie in the image, alike from both ends and at most a stride apart."""
    for length in range(size, 8 * size):
        starts = patch_starts(length, size, stride)
        assert (starts[0], starts[-1], len(starts)) == (0, length - size, grid_shape(length, size, size, stride)[0])
        apart = np.diff(starts)
        assert set(apart) <= set(range(1, stride + 1))
        back = [length - size - start for start in reversed(starts)]
        assert sum(one != other for one, other in zip(starts, back, strict=True)) <= 1  # the middle one, by a pixel
        assert (length - size) % stride or starts == list(range(0, length - size + 1, stride))


def test_a_grid_that_does_not_fit_is_closed_up():
    images = torch.arange(2 * 50 * 41.0).view(2, 1, 50, 41)
    patches = extract_patches(images, 16, 8)
    assert patches.shape[1:3] == grid_shape(50, 41, 16, 8) == (6, 5)
    ys, xs = patch_starts(50, 16, 8), patch_starts(41, 16, 8)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            assert torch.equal(patches[:, i, j], images[..., y : y + 16, x : x + 16])


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(CpcFastError, match=r"10 x 40 pixels is smaller than one patch \(16 pixels\)"):
        grid_shape(10, 40, 16, 8)


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_targets_lie_offset_cells_in_the_direction(directions):
    b, gy, gx, offsets = 2, 5, 4, (2, 3)
    sources, targets, counts = geometry((b, gy, gx), offsets, directions, torch.device("cpu"))
    expected = [
        (i * gy * gx + y * gx + x, i * gy * gx + (y + dy * o) * gx + x + dx * o)
        for dy, dx in DIRECTIONS[:directions]
        for o in offsets
        for i in range(b)
        for y in range(gy)
        for x in range(gx)
        if 0 <= y + dy * o < gy and 0 <= x + dx * o < gx
    ]
    assert list(zip(sources.tolist(), targets.tolist(), strict=True)) == expected
    assert sum(counts) == len(expected)


def test_steps_longer_than_the_grid_make_no_predictions():
    _, _, counts = geometry((1, 3, 3), (2, 3, 9), 1, torch.device("cpu"))
    assert counts == [3, 0, 0]


@pytest.mark.parametrize("direction", range(4))
def test_a_masked_context_sees_only_what_is_behind_it(direction):
    torch.manual_seed(0)
    net = ContextNet("masked-conv", 4, 4)
    latents = torch.randn(1, 7, 7, 4, requires_grad=True)
    y, x = 3, 3
    net(latents)[direction][0, y, x].sum().backward()
    seen = latents.grad[0].abs().sum(-1) > 0
    dy, dx = DIRECTIONS[direction]
    ahead = [(a, b) for a in range(7) for b in range(7) if (a - y) * dy + (b - x) * dx > 0]
    assert seen[y, x]
    assert not any(seen[a, b] for a, b in ahead)
    assert seen[y - dy, x - dx]


def test_each_patch_is_encoded_alone():
    model = CPC(SMALL)
    images = torch.randn(1, 1, 48, 48)
    changed = images.clone()
    changed[..., 40:, 40:] += 1.0  # inside the last patch of the grid only
    differs = (model.latents(images) != model.latents(changed)).any(-1)[0]
    assert differs[-1, -1]
    assert differs.sum() == 1


def made(predictions: Predictions) -> torch.Tensor:
    """Predictions as they are defined, one at a time."""
    step = torch.repeat_interleave(torch.arange(len(predictions.counts)), torch.tensor(predictions.counts))
    return torch.einsum("ndc,nc->nd", predictions.weight[step], predictions.contexts[predictions.sources])


@pytest.mark.parametrize("kind", ["none", "masked-conv"])
@pytest.mark.parametrize("shifted", [0, 2])
@pytest.mark.parametrize("negatives", ["batch", "other-images", "sampled", "hard"])
def test_the_loss_is_the_reference_loss(negatives, shifted, kind):
    torch.manual_seed(1)
    latents = torch.randn(3 + shifted, 4, 4, 8, requires_grad=True)
    context, predictor = ContextNet(kind, 8, 4), Predictor(8, (1, 2), 4)
    predictions = predictor(context(latents[:3]))
    targets, flat = predictions.targets, latents.flatten(0, 2)
    n = len(targets)
    got = cpc_loss(predictions, latents, negatives=negatives, count=6, seed=3, shifted=shifted, reduction="none")
    if negatives == "sampled":
        drawn = draw_negatives(Negatives(6, 3), targets[:, None], 48, n)
        expected = reference.sampled_info_nce(
            made(predictions)[:, None], flat[:48], targets[:, None], drawn, exclude_positives=True, reduction="none"
        )[:, 0]
    else:
        allowed = torch.ones(n, len(flat), dtype=torch.bool)
        if negatives == "other-images":
            allowed = targets[:, None] // 16 != torch.arange(len(flat)) // 16
        allowed[torch.arange(n), targets] = False
        scores = made(predictions) @ flat.T
        wrong = scores.masked_fill(~allowed, -torch.inf)
        lse = (wrong.sort(1, descending=True).values[:, :6] if negatives == "hard" else wrong).logsumexp(1)
        expected = torch.nn.functional.softplus(lse - scores.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(got, expected)
    inputs = latents, predictor.weight, *context.parameters()
    for ours, theirs in zip(
        *(torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (got, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [False, True])
@pytest.mark.parametrize("kind", ["none", "masked-conv"])
def test_a_bank_takes_the_place_of_the_batch(kind, place):
    torch.manual_seed(2)
    latents, bank = torch.randn(1, 4, 5, 8), torch.randn(30, 8)
    placed = torch.randn(1, 4, 5, 8) if place else None
    predictions = Predictor(8, (1, 2), 4, place)(ContextNet(kind, 8, 4)(latents), placed=placed)
    own = (made(predictions) * latents.flatten(0, 2)[predictions.targets]).sum(1)
    expected = torch.nn.functional.softplus((made(predictions) @ bank.T).logsumexp(1) - own)
    torch.testing.assert_close(bank_losses([(latents, predictions)], bank), expected)


def test_accuracy_counts_right_answers():
    torch.manual_seed(3)
    latents = torch.nn.functional.normalize(torch.randn(2, 4, 4, 8), dim=-1)
    predictions = Predictor(8, (1, 2), 2)(latents[None])
    right = (made(predictions) @ latents.flatten(0, 2).T).argmax(1) == predictions.targets
    assert accuracy(predictions, latents) == right.float().mean()
    assert accuracy(predictions, latents, most=7) == right[:: -(-len(right) // 7)].float().mean()


def test_what_ties_is_no_right_answer():
    torch.manual_seed(3)
    latents = torch.nn.functional.normalize(torch.randn(2, 2, 3, 8), dim=-1)
    latents[1, :, :2] = latents[0, :, :2]  # the images differ in two of their six patches
    own = torch.arange(12)
    knowing = Predictions(latents.flatten(0, 2), torch.eye(8)[None], own, own, [12])
    assert accuracy(knowing, latents) == 4 / 12
    collapsed, broken = latents[:1, :1, :1].expand(2, 2, 3, 8).contiguous(), torch.full_like(latents, torch.nan)
    for same in (collapsed, broken):
        assert accuracy(knowing._replace(contexts=same.flatten(0, 2)), same) == 0


@pytest.mark.parametrize("most", [1, 5, 20, 100])
def test_thinned_predictions_are_some_of_them(most):
    predictions = Predictor(4, (1, 2, 9), 4)(torch.randn(4, 1, 3, 4, 4))
    few, steps = predictions.thinned(most), torch.arange(12)
    assert len(few.sources) == sum(few.counts) <= most
    rows = list(zip(*(p.tolist() for p in (predictions.sources, predictions.targets)), strict=True))
    assert set(zip(few.sources.tolist(), few.targets.tolist(), strict=True)) <= set(rows)
    every = -(-len(rows) // min(most, len(rows)))
    step = torch.repeat_interleave(steps, torch.tensor(predictions.counts))[::every]
    assert torch.equal(step, torch.repeat_interleave(steps, torch.tensor(few.counts)))


def test_what_scoring_has_seen_can_be_trained_on():
    model, image = CPC(SMALL), torch.randn(1, 1, 56, 80)  # a grid that no other test has
    with torch.inference_mode():
        model.surprise(image[0], torch.randn(9, SMALL.features))
    model(image).loss.backward()


NARROW = """
import torch
from cpc_fast.latents import PatchEncoder
torch.set_num_threads(1)  # with two, memory is laid out so that it often goes well
for width in (2, 3, 1, 7):
    encoder = PatchEncoder(1, width, stem=2).to(memory_format=torch.channels_last)
    for _ in range(8):
        encoder(torch.randn(200, 1, 32, 32)).square().sum().backward()
"""


def test_narrow_encoders_learn():
    """In a process of its own: what writes past its memory may crash, or hang, long after."""
    subprocess.run([sys.executable, "-c", NARROW], check=True, timeout=120)


def test_a_shortcut_with_a_stride_leaves_rows_and_columns_out():
    block, x = ResidualBlock(8, 16, 2, "group"), torch.randn(3, 8, 7, 6)
    assert block.shortcut is not None
    rest = block.conv2(F.relu(block.norm2(block.conv1(F.relu(block.norm1(x))))))
    torch.testing.assert_close(block(x), rest + F.conv2d(x, block.shortcut.weight, stride=2))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_models(name):
    config = preset(name).replace(width=8)
    model = CPC(config)
    side = config.image_size or 128
    loss = model(torch.randn(3, config.channels, side, side)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())


def test_an_encoder_of_ones_own():
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 12))
    model = CPC(SMALL, backbone)
    assert model.latents(torch.randn(1, 1, 48, 48)).shape == (1, 5, 5, 12)
    with pytest.raises(CpcFastError, match="one vector per patch"):
        CPC(SMALL, torch.nn.Conv2d(1, 4, 3))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm": "batch"}, "batch statistics"),
        ({"directions": 3}, "1, 2 or 4"),
        ({"colour": 1}, "no field called colour"),
        ({"shifts": ("swirl",)}, "quarter-turn"),
        ({"epochs": 0}, "at least 1"),
    ],
)
def test_a_config_that_cannot_work_says_why(changes, says):
    with pytest.raises(UsageError, match=says):
        Config().replace(**changes)


def test_a_config_survives_json():
    config = preset("cpu-demo").replace(crop=96)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(UsageError, match="There are: cpu-demo"):
        preset("papper")


@pytest.mark.parametrize(
    ("sides", "patch", "stem"),
    [([128], 32, 2), ([160], 32, 2), ([256], 64, 4), ([256, 300, 140], 32, 2), ([512], 128, 8), ([4096], 128, 8),
     ([100], 32, 2), ([64], 16, 1), ([40], 16, 1)],
)  # fmt: skip
def test_patches_grow_with_the_images(sides, patch, stem):
    fitted = preset("cpu-demo").fitted_to(sides)
    assert (fitted.patch_size, fitted.patch_stride, fitted.stem, fitted.crop) == (patch, patch // 2, stem, 3 * patch)
    assert fitted.fitted_to([1024]) == fitted  # once fitted, lengths are final
    assert preset("cpu-demo").replace(patch_size=16).fitted_to([512]).patch_size == 16  # and so are those set by hand


def test_one_small_image_does_not_shrink_the_patches_of_all():
    config, names = preset("cpu-demo"), [f"{i}.png" for i in range(20)]
    says = r"^7.png has a shorter side of 40 pixels, where 256 is typical: patches would shrink from 64 to 16 pixels"
    with pytest.raises(CpcFastError, match=says):
        config.fitted_to([256] * 7 + [40] + [256] * 12, names)
    with pytest.raises(CpcFastError, match=r"^Image 0 has .* 40 pixels \(and 1 more like it\), where"):
        config.fitted_to([40, 40] + [256] * 18)
    assert config.fitted_to([40] * 3 + [256] * 17).patch_size == 16  # so many are no mistake
    assert config.fitted_to([150] + [256] * 19).patch_size == 32  # of the others' kind
    assert config.fitted_to([100] + [210] * 19).patch_size == 32  # costs nothing


@pytest.mark.parametrize("negatives", ["batch", "other-images", "sampled", "hard"])
@pytest.mark.parametrize("shifts", [(), ("noise",)])
def test_a_model_that_knows_nothing_has_the_loss_of_guessing(negatives, shifts):
    config = Config(width=4, negatives=negatives, negatives_count=5, shifts=shifts, shift_copies=2)
    model = CPC(config)
    with torch.no_grad():
        model.members[0].predictor.weight.zero_()  # all scores are equal
    images = torch.randn(3, 1, 96, 96)
    loss = model(images, torch.randn(6, 1, 96, 96) if shifts else None).loss
    assert loss.item() == pytest.approx(guessing(config, images=3, side=96), rel=1e-5)
    if negatives == "hard":  # no more than there are
        model.config = model.members[0].config = config.replace(negatives_count=5000)
        loss = model(images, torch.randn(6, 1, 96, 96) if shifts else None).loss
        assert loss.item() == pytest.approx(guessing(model.config, images=3, side=96), rel=1e-5)


@pytest.mark.parametrize("context", ["none", "masked-conv"])
def test_a_finer_grid_holds_those_of_training_side_by_side(context):
    config = Config(width=4, steps=2, context=context, finer=2)
    model = CPC(config).eval()
    bank, image = torch.randn(20, 16), torch.randn(1, 32 + 16 * 8, 32 + 16 * 7)
    gy, gx = 17, 15
    losses, sources, targets, counts = model.surprise(image, bank)
    fine = patch_medians(losses, sources, targets, counts, (gy, gx))
    model.config = config.replace(finer=1)
    for y in (0, 1):
        for x in (0, 1):
            rows, columns = len(range(y, gy, 2)), len(range(x, gx, 2))
            part = image[:, 8 * y : 8 * y + 16 * rows + 16, 8 * x : 8 * x + 16 * columns + 16]
            losses, sources, targets, counts = model.surprise(part, bank)
            coarse = patch_medians(losses, sources, targets, counts, (rows, columns))
            torch.testing.assert_close(fine[y::2, x::2], coarse)


@pytest.mark.parametrize("context", ["none", "masked-conv"])
@pytest.mark.parametrize("directions", [2, 4])
def test_mirror_images_are_scored_with_an_image(context, directions):
    """Each of the four says what the model says of it alone, where that lies in the image; and the surprise at a mirror
    image is the mirror image of the surprise."""
    config = Config(width=4, steps=2, context=context, directions=directions, flips=True, mirrored=True, place=True)
    model = CPC(config).eval()
    bank, image, grid = torch.randn(20, 16), torch.randn(1, 32 + 16 * 5, 28 + 16 * 6), (6, 7)

    def table(losses, sources, targets, counts):
        steps = [name for name, count in zip(config.predicts, counts, strict=False) for _ in range(count)]
        return dict(zip(zip(steps, sources.tolist(), targets.tolist(), strict=False), losses, strict=False))

    scorer = Scorer(model, bank)
    losses, *where = model.surprise(image, bank)
    means = scorer.judge((losses, *where, grid)).grid
    assert len(where[2]) == 4 * len(config.predicts)
    for found, axes, swaps in zip(
        losses.chunk(4),
        ((), (1,), (2,), (1, 2)),
        (
            {},
            {"down": "up", "up": "down"},
            {"right": "left", "left": "right"},
            {"down": "up", "up": "down", "right": "left", "left": "right"},
        ),
        strict=True,
    ):
        found = table(found, *where)
        model.config = config.replace(mirrored=False)
        alone = table(*model.surprise(image.flip(axes), bank))
        assert len(found) == len(alone)
        cells = torch.arange(grid[0] * grid[1]).view(grid).flip([axis - 1 for axis in axes]).flatten().tolist()
        for (step, source, target), loss in alone.items():
            way = " ".join(swaps.get(word, word) for word in step.split())
            torch.testing.assert_close(found[way, cells[source], cells[target]], loss)
        model.config = config
        turned = scorer.judge((*model.surprise(image.flip(axes), bank), grid)).grid
        torch.testing.assert_close(turned.flip([axis - 1 for axis in axes]), means)


def test_mirror_images_need_a_model_that_has_seen_some():
    with pytest.raises(
        UsageError, match="mirrored is True where flips is False and directions is 4; mirror images can"
    ):
        Config(mirrored=True)
    with pytest.raises(UsageError, match="mirrored is True where flips is True and directions is 1; mirror images can"):
        Config(mirrored=True, flips=True, directions=1)


def test_places_and_mirror_images_in_float64():
    model = CPC(Config(width=4, flips=True, mirrored=True, place=True)).double().eval()
    image, bank = torch.randn(1, 100, 120).double(), torch.randn(9, 16).double()
    assert model.surprise(image, bank)[0].dtype == torch.float64


@pytest.mark.parametrize("kind", ["none", "masked-conv"])
def test_a_place_speaks_about_its_own_patch(kind):
    torch.manual_seed(0)
    latents, placed = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    predictions = Predictor(8, (1,), 4, place=True)(ContextNet(kind, 8, 4)(latents), placed=placed)
    assert predictions.counts[-1] == 24
    torch.testing.assert_close(made(predictions)[-24:], placed.flatten(0, 2) @ predictions.weight[-1].T)
    assert predictions.targets[-24:].tolist() == list(range(24))


@pytest.mark.parametrize("standardise", ["set", "image", "imagenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_windows_are_cut_from_standardised_images(standardise, channels):
    """To the last bit, whether the pixels or the standardised values are cut."""
    model = CPC(TINY_CONFIG.replace(standardise=standardise, channels=channels, jitter=0.0))
    images = [np.repeat(texture(i, 61, 80), channels, 2) for i in range(3)]
    model.measure_pixels(images)
    batch, frames = make_batch(model, images, 32, torch.Generator().manual_seed(3))
    for image, window, (top, left) in zip(images, batch, frames[:, :2].int().tolist(), strict=True):
        assert torch.equal(window, model.standardise(image)[:, top : top + 32, left : left + 32])


def test_a_gamma_that_no_camera_has_is_no_config():
    with pytest.raises(UsageError, match=r"gamma is 2000.0; it must be at most 4"):
        Config(gamma=2000.0)


def test_hard_negatives_are_a_ranks_own():
    latents = torch.randn(1, 3, 3, 8)
    with pytest.raises(ValueError, match=r"across_ranks must be auto or local\. Got 'ring'"):
        cpc_loss(Predictor(8, (1,), 1)(latents[None]), latents, negatives="hard", across_ranks="ring")


def test_gamma_is_a_power_of_the_pixels():
    """Black and white stay; the power is the window's own, and drawn once more for it where there is a gamma."""
    model = CPC(TINY_CONFIG.replace(jitter=0.0, gamma=0.5))
    image = np.repeat(np.linspace(0, 255, 48).astype(np.uint8)[None], 48, 0)[..., None]
    images, powers = [image] * 8, []
    batch, _ = make_batch(model, images, 48, torch.Generator().manual_seed(0))
    for window in batch * model.pixel_spread + model.pixel_mean:
        row = window[0, 0].clamp(0, 255) / 255
        power = float(row[24].log() / np.log(image[0, 24, 0] / 255))
        torch.testing.assert_close(row, torch.tensor(image[0, :, 0] / 255).float() ** power, rtol=0, atol=1e-5)
        powers.append(power)
    assert len({round(power, 4) for power in powers}) == 8
    assert 0.3 < np.std(np.log(powers)) < 0.8


def test_each_patch_can_have_a_brightness_and_contrast_of_its_own():
    """Only in training, and from what is handed in to draw from."""
    model = CPC(TINY_CONFIG.replace(norm="none", patch_jitter=0.3))
    images, member = torch.randn(1, 1, 48, 48).expand(2, -1, -1, -1), model.members[0]
    plain = member.latents(images)
    assert torch.equal(plain[0], plain[1])
    first, again = (member.latents(images, draws=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert (first[0] != first[1]).any(-1).all()
    calm = model(images, images, seed=1).loss
    assert model(images, images, seed=1).loss == calm
    assert model(images, images, seed=1, draws=torch.Generator().manual_seed(1)).loss != calm
    patches = jittered(torch.zeros(2, 3, 3, 1, 8, 8), 0.3, torch.Generator().manual_seed(0), each=3)
    assert len(patches.unique()) == 18


def test_windows_know_where_they_lie_in_the_image_as_it_is_shown():
    """In an image whose brightness tells the place, that of a window of it is where its frame says, mirrored or not."""
    model = CPC(TINY_CONFIG.replace(flips=True, jitter=0.0, place=True))
    y, x = np.mgrid[:64, :80]
    images = [(3 * y).astype(np.uint8)[..., None], (3 * x).astype(np.uint8)[..., None]]
    mirrored = 0
    for i in range(20):
        batch, frames = make_batch(model, images, 32, torch.Generator().manual_seed(i))
        pixels = batch * model.pixel_spread + model.pixel_mean
        places = patch_places(frames, (32, 32), 16, 8)
        for axis, (window, length) in enumerate(zip(pixels[:, 0], (64, 80), strict=True)):
            window = window if axis == 0 else window.T
            falls = bool(window[0, 0] > window[1, 0])
            mirrored += falls
            for cell in range(3):
                shown = window[8 * cell : 8 * cell + 16].mean() / 3 + 0.5
                centre = places[axis, cell, cell, axis] * length
                assert float(length - centre if falls else centre) == pytest.approx(float(shown), abs=1e-3)
    assert 5 < mirrored < 35


@pytest.mark.parametrize(("device", "precision", "inside"), [
    ("cuda", "float32", "ieee"), ("cuda", "auto", "tf32"), ("cpu", "float32", "tf32"),
])  # fmt: skip
def test_float32_is_float32_in_the_convolutions_of_a_gpu(device, precision, inside):
    """torch's own choice is TF32."""
    conv = torch.backends.cudnn.conv
    assert conv.fp32_precision == "tf32"
    with convolutions(torch.device(device), precision):
        assert conv.fp32_precision == inside
    assert conv.fp32_precision == "tf32"
    assert torch.backends.cudnn.allow_tf32  # which torch refuses to read where the two disagree


def test_weights_are_copied_for_their_mean_once(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    average_weights(optimizer, 0.5, 0)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    optimizer.step()
    average_weights(optimizer, 0.5, 100)
    assert torch.equal(optimizer.state[weight]["average"], torch.tensor([-0.95] * 3))  # of 0 and -1.9


def test_backward_has_the_precision_of_forward(monkeypatch):
    asked, enter = [], module.convolutions
    monkeypatch.setattr(module, "convolutions", lambda *how: asked.append(how) or enter(*how))
    config = TINY_CONFIG.replace(precision="float32", epochs=1)
    model, images = CPC(config), [texture(seed) for seed in range(4)]
    module.train(model, images, config, optimizer=module.make_optimizer(model, config))
    assert asked == [(torch.device("cpu"), "float32")] * 2
