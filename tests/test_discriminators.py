"""CODiff's discriminator is half of diffusers' UNet with a head, and, unlike the authors', it and its input learn."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from tests.reduced_sd21 import reduced_base
from tests.test_reduced_sd21 import FULL_UNET
from training.networks.discriminators import LatentDiscriminator, discriminator_loss, generator_loss


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(reduced_base().folder / "unet").eval()


def make(unet, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return LatentDiscriminator(unet, rank=4, alpha=2.0, generator=generator, **options)


def with_trained_adapters(discriminator):
    """Fresh adapters do nothing; these do."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in discriminator.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return discriminator


@torch.no_grad()
def with_merged_adapters(unet, discriminator, alpha=2.0, rank=4):
    """A copy of the whole UNet that has learned what the adapters have, and a list where it leaves middle features."""
    whole, seen = copy.deepcopy(unet), []
    for name, module in whole.named_modules():
        adapted = dict(discriminator.backbone.named_modules()).get(name)
        if hasattr(adapted, "lora_A"):
            down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
            module.weight += alpha / rank * (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
    whole.mid_block.register_forward_hook(lambda _, __, output: seen.append(output))
    return whole, seen


def judged(head, features):
    """The head by its formula."""
    first, norm, _, last = head
    hidden = F.conv2d(features, first.weight, first.bias, stride=1, padding=1)
    hidden = F.silu(F.group_norm(hidden, 32, norm.weight, norm.bias, 1e-5))
    return F.conv2d(hidden, last.weight, last.bias, stride=1, padding=1)


def latents(*size, seed=1):
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(seed))


def full_size():
    with torch.device("meta"):
        whole = UNet2DConditionModel(**FULL_UNET)
    return LatentDiscriminator(whole, rank=16, alpha=8.0, generator=torch.Generator())


def test_at_full_size_it_has_the_authors_parts():
    discriminator = full_size()
    frozen = [p.numel() for name, p in discriminator.backbone.named_parameters() if "lora" not in name]
    assert sum(frozen) == 351_662_720 - 2 * 320  # they keep conv_norm_out, which nothing goes through
    assert discriminator.prompt.shape == (1, 77, 1024)
    assert [tuple(p.shape) for p in discriminator.head.parameters()] == [
        (2560, 1280, 4, 4), (2560,), (2560,), (2560,), (1, 2560, 4, 4), (1,)
    ]  # fmt: skip
    assert discriminator.smallest_latent == 17
    adapted = {name.split(".lora_A")[0] for name, _ in discriminator.backbone.named_parameters() if ".lora_A" in name}
    kinds = {"to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
             "conv_shortcut", "downsamplers.0.conv", "time_emb_proj"}  # fmt: skip
    assert {next((kind for kind in kinds if name.endswith(kind)), name) for name in adapted} == kinds


@torch.no_grad()
def test_the_logits_are_the_heads_of_the_feature_that_diffusers_computes_with_merged_adapters(unet):
    discriminator = with_trained_adapters(make(unet))
    x = latents(12, 9)
    whole, seen = with_merged_adapters(unet, discriminator)
    whole(x, 199, discriminator.prompt.expand(2, -1, -1))
    expected = judged(discriminator.head, seen[0])
    logits = discriminator(x)
    assert logits.shape == (2, 1, 4, 3)  # half of 12 and of 9, rounded up, less 2
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert float(logits.std()) > 0.05


def test_gradients_reach_the_adapters_the_prompt_the_head_and_the_input(unet):
    discriminator, x = make(unet), latents(8, 8).requires_grad_()
    discriminator(x).square().sum().backward()
    gradients = {name: p.grad for name, p in discriminator.named_parameters() if p.requires_grad}
    silent = [name for name, grad in gradients.items() if grad is None or not grad.any()]
    # A learns once B, which starts at 0, has moved.
    assert silent == [name for name in gradients if "lora_A" in name]
    assert any("lora_B" in name for name in gradients)
    assert {name.split(".")[0] for name in gradients} == {"backbone", "prompt", "head"}
    assert x.grad is not None
    assert float(x.grad.abs().min()) > 0
    assert not [name for name, p in discriminator.named_parameters() if p.grad is not None and not p.requires_grad]


def test_the_generator_learns_from_it_also_while_it_is_frozen(unet):
    discriminator = with_trained_adapters(make(unet)).requires_grad_(False)
    x = latents(8, 8).requires_grad_()
    loss = generator_loss(discriminator(x))
    (gradient,) = torch.autograd.grad(loss, x)
    step = 0.1 * gradient / gradient.norm()
    with torch.no_grad():
        change = generator_loss(discriminator(x - step)) - generator_loss(discriminator(x + step))
    assert change.item() == pytest.approx(-0.2 * gradient.norm().item(), rel=0.02)
    assert change < -1e-3


def test_the_authors_way_teaches_the_head_alone_and_gives_the_same_logits(unet):
    authors, ours = make(unet, frozen_backbone=True), make(unet)
    x = latents(8, 8).requires_grad_()
    logits = authors(x)
    assert torch.equal(logits, ours(x))
    generator_loss(logits).backward()
    assert x.grad is None
    assert {name for name, p in authors.named_parameters() if p.requires_grad} == {
        f"head.{layer}.{leaf}" for layer in (0, 1, 3) for leaf in ("weight", "bias")
    }
    assert all(p.grad.any() for p in authors.head.parameters())
    assert not [name for name, p in authors.named_parameters() if p.grad is not None and not name.startswith("head")]


def test_checkpointed_activations_change_no_gradient(unet):
    gradients = []
    for checkpointing in (False, True):
        discriminator = with_trained_adapters(make(unet, gradient_checkpointing=checkpointing)).train()
        calls = []
        discriminator.backbone.down_blocks[0].resnets[0].conv1.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        x = latents(8, 8).requires_grad_()
        discriminator(x).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([x.grad, *(p.grad for p in discriminator.parameters() if p.requires_grad)])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_frozen_weights_in_bfloat16_leave_what_learns_in_float32(unet):
    full, low = make(unet), make(unet, dtype=torch.bfloat16)
    types = {(p.requires_grad, p.dtype) for p in low.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    x = latents(8, 8)
    logits, expected = low(x), full(x)
    assert logits.dtype == torch.float32
    assert float(((logits - expected).norm() / expected.norm()).detach()) < 0.1
    for discriminator in (low, full):
        discriminator(x).square().sum().backward()
    ours, theirs = low.prompt.grad, full.prompt.grad
    assert ours.dtype == torch.float32
    assert float(F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.9


def test_the_unet_it_is_made_of_stays_whole_and_as_it_was(unet):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    required = [p.requires_grad for p in unet.parameters()]
    discriminator = with_trained_adapters(make(unet, dtype=torch.bfloat16))
    discriminator(latents(8, 8)).sum().backward()
    assert len(unet.up_blocks) == 2
    assert [p.requires_grad for p in unet.parameters()] == required
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert all(p.grad is None for p in unet.parameters())


def test_what_is_drawn_comes_from_the_generator_alone(unet):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = make(unet)
        torch.manual_seed(2)
        again, other = make(unet), make(unet, seed=1)
    x = latents(8, 8)
    assert torch.equal(first(x), again(x))
    assert not torch.allclose(first(x), other(x))
    assert float(first.prompt.detach().std()) == pytest.approx(1, abs=0.02)


def test_latents_that_leave_no_logit_are_refused_with_the_smallest_crop(unet):
    discriminator = make(unet)
    assert discriminator(latents(5, 5)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"latents of at least 5x5, that is crops of 40 pixels, got \(2, 4, 6, 4\)"):
        discriminator(latents(6, 4))


def test_tokens_and_a_generator_are_taken_as_of_sodiffs_and_not_used(unet):
    discriminator, x, generator = make(unet), latents(8, 8), torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert torch.equal(discriminator(x, torch.ones(2, 77, 1024), generator), discriminator(x))
    assert torch.equal(generator.get_state(), before)


def test_losses_are_binary_cross_entropies():
    real, fake = latents(3, 3), 3 * latents(3, 3, seed=2)
    cross_entropy = torch.nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    expected = (cross_entropy(real, ones) + cross_entropy(fake, zeros)) / 2
    torch.testing.assert_close(discriminator_loss(real=real, fake=fake), expected)
    torch.testing.assert_close(generator_loss(fake), cross_entropy(fake, ones))
    assert generator_loss(torch.full((1,), -200.0)).isfinite()
