import dataclasses

import torch
from gymnasium import spaces

from worldmodel.data.batch import Batch
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.model.blocks import (
    ConvLSTMBlock,
    DeltaBlock,
    GatedConvBlock,
    GRUBlock,
    LSTMBlock,
    Mamba2Block,
    Mamba3Block,
    RotaryScanBlock,
    ScanBlock,
    TokenAttentionBlock,
)
from worldmodel.model.custom_block import CustomBlock
from worldmodel.model.decision import DecisionConfig
from worldmodel.model.evaluation import EvaluationConfig
from worldmodel.model.latents import CategoricalConfig
from worldmodel.model.memory import MemoryConfig
from worldmodel.model.perception import PerceptionConfig
from worldmodel.model.place_block import PlaceBlock
from worldmodel.model.prediction import PredictionConfig
from worldmodel.model.token_blocks import BlockScanBlock, LocalAttentionBlock, MemoryAttentionBlock
from worldmodel.model.world_model import WorldModel, WorldModelConfig

# Options of the smallest training run, whose blocks are of popgym's kind.
TINY = {
    "preset": "popgym",
    "model.perception.hidden": 8,
    "model.perception.latent.variables": 2,
    "model.perception.latent.classes": 4,
    "model.memory.width": 8,
    "model.memory.blocks.0.d-state": 4,
    "model.memory.blocks.0.groups": 1,
    "model.prediction.hidden": 8,
    "model.evaluation.hidden": 8,
    "model.decision.hidden": 8,
    "replay.window": 24,
    "replay.batch-size": 2,
    "replay.burn-in": 4,
    "replay.max-steps": 400,
}


def tiny_options(**more):
    named = {**TINY, **{name.replace("_", "-"): value for name, value in more.items()}}
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


SEEN = spaces.Dict(card=spaces.Discrete(4), place=spaces.Box(-1, 1, (3,)))
ROTARY = RotaryScanBlock(d_state=4, groups=2, selective_angle=True, selective_speed=True)
MEMORIES = {
    "rotary_scan": MemoryConfig(16, (ROTARY, ROTARY)),
    "scan": MemoryConfig(16, (ScanBlock(d_state=4, groups=2),)),
    "mamba2": MemoryConfig(16, (Mamba2Block(d_state=6, headdim=8, groups=2),)),
    "mamba3": MemoryConfig(16, (Mamba3Block(d_state=6, headdim=8),)),
    "delta": MemoryConfig(16, (DeltaBlock(heads=2, d_head=4),)),
    "gated_conv": MemoryConfig(16, (GatedConvBlock(),)),
    "none": MemoryConfig(16, (GatedConvBlock(d_conv=1),)),
    "conv_lstm": MemoryConfig(24, (ConvLSTMBlock((2, 3)),)),
    "gru": MemoryConfig(16, (GRUBlock(), GRUBlock())),
    "lstm": MemoryConfig(16, (LSTMBlock(),)),
    "hybrid": MemoryConfig(24, (ROTARY, ConvLSTMBlock((2, 3)), CustomBlock("worldmodel.model.blocks:GRU"))),
    "block_scan": MemoryConfig(
        16,
        (BlockScanBlock((2, 2), (1, 2), d_state=4, groups=2, scan="scan"), LocalAttentionBlock(None, 2, 2)),
        tokens=4,
    ),
    "local_attention": MemoryConfig(16, (LocalAttentionBlock(frames=12, heads=2),)),
    "memory_attention": MemoryConfig(16, (MemoryAttentionBlock(3, 4, heads=2),)),
    "place": MemoryConfig(16, (PlaceBlock(period=5, channels=4),), tokens=4),
    "tokens": MemoryConfig(16, (ROTARY, TokenAttentionBlock(heads=2), ConvLSTMBlock((2, 2))), tokens=3),
}
CONFIG = WorldModelConfig(
    PerceptionConfig(CategoricalConfig(variables=3, classes=4), hidden=16),
    MEMORIES["rotary_scan"],
    PredictionConfig(hidden=16),
    EvaluationConfig(hidden=16),
    DecisionConfig(hidden=16),
)


def small_model(seen=SEEN, done=None, dtype=torch.float64, **changed):
    """Random weights; keyword arguments replace fields of CONFIG."""
    done = done or spaces.Discrete(3)
    config = dataclasses.replace(CONFIG, **changed)
    model = WorldModel(ObservationSpec.from_space(seen), ActionSpec.from_space(done), config).to(dtype)
    for name, parameter in model.named_parameters():
        if "angle_proj" in name or (parameter == 0).all():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_batch(model, batch=3, time=14, resets=True):
    """Episodes end at a different step per row; the last row is padded."""
    observations = {}
    for name, modality in model.observation_spec.modalities.items():
        shape = (batch, time, *modality.shape)
        whole = modality.dtype != "float32"
        size = min(modality.sizes) if modality.sizes else 256
        observations[name] = torch.randint(size, shape, dtype=torch.uint8) if whole else torch.randn(shape)
    action_spec = model.action_spec
    if action_spec.kind == "discrete":
        actions = torch.stack([torch.randint(size, (batch, time)) for size in action_spec.sizes], -1)
        actions = actions if action_spec.shape else actions.squeeze(-1)
    else:
        actions = torch.rand(batch, time, *action_spec.shape) * 2 - 1
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = True
    is_last = torch.zeros(batch, time, dtype=torch.bool)
    terminated = torch.zeros(batch, time, dtype=torch.bool)
    valid = torch.ones(batch, time, dtype=torch.bool)
    if resets:
        for row in range(batch):
            end = 4 + row
            is_last[row, end] = True
            terminated[row, end - 1] = row % 2 == 0
            is_first[row, end + 1] = True
        is_last[-1, -4] = True
        valid[-1, -3:], is_last[-1, -3:] = False, True
    return Batch(observations, actions, torch.randn(batch, time), terminated, is_last, is_first, valid)


def set_reward_scale(model, scale):
    model.reward_scale.mean_square.fill_(scale**2)


def whole_episodes(model, rows=3, time=14):
    batch = random_batch(model, rows, time, resets=False)
    batch.is_first[:, 0] = True
    return batch


def step_by_step(model, batch, state=None):
    """Rolls out ``observe_step``: features (batch, time, features), final state."""
    state = state or batch.state or model.init_state(batch.shape[0])
    features, previous = [], state["action"]
    for t in range(batch.shape[1]):
        modalities = {name: modality[:, t] for name, modality in batch.observations.items()}
        feature, state = model.observe_step(modalities, previous, state, batch.is_first[:, t])
        features.append(feature)
        previous = model.action_spec.encode(batch.actions[:, t]).to(feature.dtype) * ~batch.is_last[:, t, None]
        state = {**state, "action": previous}
    return torch.stack(features, 1), state
