"""SODiff's discriminator is half of diffusers' SDXL (or SD 2.1) on latents with noise, under the picture's prompt."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

from tests.reduced_sd21 import SCHEDULER
from tests.reduced_sdxl import FULL_SDXL, SMALL_SD21, SMALL_SDXL, small_unet, write_sdxl
from tests.test_discriminators import judged, latents, with_merged_adapters, with_trained_adapters
from tests.test_reduced_sd21 import FULL_UNET
from training.networks.base_models import load_sdxl_unet
from training.networks.discriminators import PromptedDiscriminator, discriminator_loss, generator_loss

KINDS = pytest.mark.parametrize("config", [SMALL_SDXL, SMALL_SD21], ids=["sdxl", "sd21"])


def make(config=None, seed=0, unet=None, **options):
    return PromptedDiscriminator(
        unet or small_unet(config), rank=4, alpha=2.0, context_dim=24, tokens=5, generator=draws(seed), **options
    )


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(count=2, seed=5):
    return torch.randn(count, 5, 24, generator=draws(seed))


def full_size(config):
    with torch.device("meta"):
        whole = UNet2DConditionModel(**config)
    return PromptedDiscriminator(whole, rank=16, alpha=16.0, generator=draws(), take=True)


def frozen(discriminator):
    return sum(p.numel() for name, p in discriminator.backbone.named_parameters() if "lora" not in name)


def test_at_full_size_it_is_sdxls_first_half_with_haodiffs_mapping():
    discriminator = full_size(FULL_SDXL)
    assert frozen(discriminator) == 1_243_367_040
    assert {name: tuple(p.shape) for name, p in discriminator.prompt.named_parameters()} == {
        "hidden.0.weight": (512, 1024), "hidden.0.bias": (512,), "hidden.2.weight": (2048, 512),
        "hidden.2.bias": (2048,), "pooled.1.weight": (1280, 77 * 1024),
    }  # fmt: skip
    assert discriminator.head[0].weight.shape == (2560, 1280, 4, 4)
    assert discriminator.smallest_latent == 9
    # Latents on one device, the generator on another.
    logits = discriminator(
        torch.empty(2, 4, 64, 48, device="meta"), torch.empty(2, 77, 1024, device="meta"), torch.Generator()
    )
    assert logits.shape == (2, 1, 14, 10)


def test_at_full_size_of_sd21_nothing_is_pooled():
    discriminator = full_size(FULL_UNET)
    assert frozen(discriminator) == 351_662_720 - 2 * 320  # the published count has conv_norm_out
    assert discriminator.prompt.pooled is None
    assert discriminator.prompt.hidden[2].weight.shape == (1024, 512)
    assert discriminator.smallest_latent == 17


@KINDS
@torch.no_grad()
def test_the_logits_are_the_heads_of_the_feature_that_diffusers_computes_of_noised_latents(config):
    unet = small_unet(config)
    discriminator = with_trained_adapters(make(unet=unet))
    x, tokens, generator = latents(12, 9), prompts(), draws(7)
    timesteps = torch.randint(0, 1000, (2,), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    noisy = DDPMScheduler(**SCHEDULER).add_noise(x, noise, timesteps)
    weights = dict(discriminator.prompt.named_parameters())
    hidden = F.silu(F.linear(tokens, weights["hidden.0.weight"], weights["hidden.0.bias"]))
    hidden = F.silu(F.linear(hidden, weights["hidden.2.weight"], weights["hidden.2.bias"]))
    added = None
    if config is SMALL_SDXL:
        pooled = F.silu(tokens.reshape(2, -1) @ weights["pooled.1.weight"].T)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[96, 72, 0, 0, 96, 72]] * 2)}
    whole, seen = with_merged_adapters(unet, discriminator)
    whole(noisy, timesteps, hidden, added_cond_kwargs=added)
    logits = discriminator(x, tokens, draws(7))
    assert logits.shape == (2, 1, 4, 3)  # half of 12 and of 9, rounded up, less 2
    torch.testing.assert_close(logits, judged(discriminator.head, seen[0]), rtol=0, atol=1e-5)
    assert float(logits.std()) > 0.05


def test_noise_is_that_of_diffusers_scheduler_and_each_latent_has_its_own():
    discriminator = make()
    x = latents(6, 5)[:1].expand(300, -1, -1, -1)
    noisy, timesteps = discriminator.diffuse(x, draws(3))
    assert len(timesteps.unique()) > 200
    schedule = DDPMScheduler(**SCHEDULER)
    abar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = (noisy - abar.sqrt() * x) / (1 - abar).sqrt()
    torch.testing.assert_close(noisy, schedule.add_noise(x, noise, timesteps), rtol=0, atol=1e-5)
    strong = noise[timesteps > 100].flatten(1)  # below, rounding is felt
    assert float(strong.mean()) == pytest.approx(0, abs=0.02)
    assert float(strong.std()) == pytest.approx(1, abs=0.02)
    assert float(torch.corrcoef(strong)[~torch.eye(len(strong), dtype=torch.bool)].abs().mean()) < 0.1


def test_timesteps_are_drawn_evenly_from_the_first_to_the_last():
    one = torch.zeros(20_000, 1, 1, 1)
    _, timesteps = make().diffuse(one, draws())
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
    assert float(timesteps.float().mean()) == pytest.approx(499.5, abs=8)
    _, timesteps = make(timesteps=(5, 7)).diffuse(one, draws())
    assert timesteps.unique().tolist() == [5, 6, 7]


def test_randomness_comes_from_the_generators_alone():
    unet, x, tokens = small_unet(), latents(8, 8), prompts()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        first = make(unet=unet)
        logits = first(x, tokens, draws(3))
        torch.manual_seed(2)
        again = make(unet=unet)
        assert torch.equal(again(x, tokens, draws(3)), logits)
        assert not torch.allclose(first(x, tokens, draws(4)), logits)
        assert not torch.allclose(make(unet=unet, seed=1)(x, tokens, draws(3)), logits)


@KINDS
def test_gradients_reach_all_that_learns_and_the_latents_but_not_the_tokens(config):
    discriminator = make(config)
    x, tokens = latents(8, 8).requires_grad_(), prompts().requires_grad_()
    discriminator(x, tokens, draws()).square().sum().backward()
    gradients = {name: p.grad for name, p in discriminator.named_parameters() if p.requires_grad}
    silent = [name for name, grad in gradients.items() if grad is None or not grad.any()]
    assert silent == [name for name in gradients if "lora_A" in name]  # A learns once B, which starts at 0, has moved
    assert {name.split(".")[0] for name in gradients} == {"backbone", "prompt", "head"}
    assert float(x.grad.abs().min()) > 0
    assert tokens.grad is None
    assert not [name for name, p in discriminator.named_parameters() if p.grad is not None and not p.requires_grad]
    discriminator.zero_grad()
    with_trained_adapters(discriminator)(x, tokens, draws()).square().sum().backward()
    assert all(p.grad.any() for p in discriminator.parameters() if p.requires_grad)


def test_the_generator_learns_through_the_noise_also_while_it_is_frozen():
    discriminator = with_trained_adapters(make()).requires_grad_(False)
    x, tokens = latents(8, 8).requires_grad_(), prompts()

    def loss(x):
        return generator_loss(discriminator(x, tokens, draws(2)))

    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 0.1 * gradient / gradient.norm()
    with torch.no_grad():
        change = loss(x - step) - loss(x + step)
    assert change.item() == pytest.approx(-0.2 * gradient.norm().item(), rel=0.02)


def test_checkpointed_activations_change_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        discriminator = with_trained_adapters(make(gradient_checkpointing=checkpointing)).train()
        calls = []
        discriminator.backbone.down_blocks[0].resnets[0].conv1.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        x = latents(8, 8).requires_grad_()
        discriminator(x, prompts(), draws()).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([x.grad, *(p.grad for p in discriminator.parameters() if p.requires_grad)])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_weights_in_bfloat16_leave_what_learns_in_float32(autocast):
    unet, x, tokens = small_unet(), latents(8, 8), prompts()
    full, low = make(unet=unet), make(unet=unet, dtype=torch.bfloat16)
    types = {(p.requires_grad, p.dtype) for p in low.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = low(x, tokens, draws())
    expected = full(x, tokens, draws())
    assert logits.dtype == torch.float32
    assert float(((logits - expected).norm() / expected.norm()).detach()) < 0.1
    for result in (logits, expected):
        result.square().sum().backward()
    ours, theirs = low.prompt.pooled[1].weight.grad, full.prompt.pooled[1].weight.grad
    assert ours.dtype == torch.float32
    assert float(F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.9


def test_a_unet_is_copied_unless_it_may_be_taken_and_judges_alike():
    unet, x, tokens = small_unet(), latents(8, 8), prompts()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    required = [p.requires_grad for p in unet.parameters()]
    expected = make(unet=unet, dtype=torch.bfloat16)(x, tokens, draws())
    assert [p.requires_grad for p in unet.parameters()] == required
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    addresses = {name: p.data_ptr() for name, p in unet.named_parameters() if not name.startswith("up_blocks")}
    taken = make(unet=unet, take=True)
    assert taken.backbone is unet
    assert not [name for name, _ in unet.named_parameters() if name.startswith(("up_blocks", "conv_norm", "conv_out"))]
    kept = {name.replace("base_layer.", ""): p.data_ptr() for name, p in unet.named_parameters() if "lora" not in name}
    assert kept.items() <= addresses.items()
    other = make(unet=small_unet(), take=True, dtype=torch.bfloat16)
    assert torch.equal(other(x, tokens, draws()), expected)


def test_of_a_unet_that_is_in_bfloat16_already_the_adapters_are_float32():
    discriminator = make(unet=small_unet().to(torch.bfloat16), take=True)
    assert {(p.requires_grad, p.dtype) for p in discriminator.parameters()} == {
        (True, torch.float32), (False, torch.bfloat16)
    }  # fmt: skip
    assert discriminator(latents(8, 8), prompts(), draws()).isfinite().all()


def test_sdxl_from_a_folder_serves(tmp_path):
    unet = write_sdxl(tmp_path)
    loaded = make(unet=load_sdxl_unet(str(tmp_path)), take=True)
    x, tokens = latents(8, 8), prompts()
    assert torch.equal(loaded(x, tokens, draws()), make(unet=unet)(x, tokens, draws()))


def test_it_and_a_generator_learn_from_each_other():
    """Clean latents have a mean of 1.5 that restored ones lack at first; no other loss tells the generator."""
    discriminator, shift, generator = make(timesteps=(0, 600)), torch.zeros(4, 1, 1, requires_grad=True), draws()
    trained = [p for p in discriminator.parameters() if p.requires_grad]
    critic, maker = (torch.optim.Adam(p, rate, betas=(0.5, 0.9)) for p, rate in ((trained, 3e-3), ([shift], 0.1)))
    tokens = prompts(4)
    for _ in range(40):
        fake = torch.randn(4, 4, 6, 6, generator=generator) + shift
        real = torch.randn(4, 4, 6, 6, generator=generator) + 1.5
        (gradient,) = torch.autograd.grad(generator_loss(discriminator(fake, tokens, generator)), shift)
        logits = discriminator(torch.cat([fake.detach(), real]), torch.cat([tokens, tokens]), generator)
        of_fake, of_real = logits.chunk(2)
        critic.zero_grad()
        discriminator_loss(real=of_real, fake=of_fake).backward()
        critic.step()
        shift.grad = gradient
        maker.step()
    assert float((shift - 1.5).detach().abs().mean()) < 0.5


def test_latents_tokens_timesteps_and_unets_that_do_not_fit_are_refused():
    discriminator = make()
    assert discriminator(latents(5, 5), prompts(), draws()).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"latents of at least 5x5, that is crops of 40 pixels, got \(2, 4, 6, 4\)"):
        discriminator(latents(6, 4), prompts(), draws())
    with pytest.raises(ValueError, match=r"a prompt for each latent, \(2, 5, 24\), got \(1, 5, 24\)"):
        discriminator(latents(6, 6), prompts(1), draws())
    for timesteps in ((-1, 5), (0, 1000), (6, 5)):
        with pytest.raises(ValueError, match="a first and a last timestep from 0 to 999"):
            make(timesteps=timesteps)
    with pytest.raises(ValueError, match=r"'text_time', or of SD 2\.1's, which has none, not of one with 'text'"):
        make({**SMALL_SDXL, "addition_embed_type": "text", "encoder_hid_dim": 64})
