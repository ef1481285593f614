"""Whisper as a sequence of residual branches, and the clips' states between them.

A layer of Whisper adds the outputs of its branches to the states:

    x <- x + self_attn(norm(x)),   x <- x + encoder_attn(norm(x), encoded),   x <- x + ffn(norm(x))

The features that the last linear layer of a branch (`out_proj` or `fc2`) reads have no other
reader. A method processes the branches in order: it keeps the input states of the current branch
for all clips, changes the branch, and replaces the states by the branch's output. Each branch runs
a few times per clip, whatever the depth of the model, and memory holds one matrix of states per
clip.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper.model_modes import removed_after
from edgewhisper.silence import placed, score_weights
from export.shrink import ATTENTIONS

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

IN_MEMORY_BYTES = 400_000_000
"""States that exceed this in total are stored in files."""

FEW = 32
"""Texts of at most so many tokens are read with `attend_few`. It costs less for fewer tokens than a
head has dimensions."""

Side = Literal["encoder", "decoder"]
Kind = Literal["self_attn", "encoder_attn", "ffn"]
SIDES: tuple[Side, ...] = ("encoder", "decoder")
FFN = ("fc1", "fc2")
"""The linear layers of a feed-forward branch."""


@dataclass(frozen=True)
class Branch:
    """One residual branch of one layer."""

    side: Side
    layer: int
    kind: Kind

    @property
    def name(self) -> str:
        """The name, for example "encoder.0.self_attn" or "decoder.3.ffn"."""
        return f"{self.side}.{self.layer}.{self.kind}"

    def layer_of(self, model: nn.Module) -> Any:
        return getattr(model.model, self.side).layers[self.layer]

    def attention_of(self, model: nn.Module) -> Any:
        return getattr(self.layer_of(model), self.kind)

    def last_of(self, model: nn.Module) -> nn.Module:
        """Return the last linear layer, whose output is added to the states."""
        if self.kind == "ffn":
            return self.layer_of(model).fc2
        return self.attention_of(model).out_proj


def branches_of(model: nn.Module, side: Side) -> list[Branch]:
    """Return the branches of one side in their order of execution."""
    kinds: tuple[Any, ...] = (*ATTENTIONS[side], "ffn")
    layers = getattr(model.model, side).layers
    return [Branch(side, i, kind) for i in range(len(layers)) for kind in kinds]


@dataclass
class States:
    """Tensors by clip number, in memory up to IN_MEMORY_BYTES and beyond it in files."""

    bytes: int = 0
    _kept: dict[int, Tensor] = field(default_factory=dict)
    _files: set[int] = field(default_factory=set)
    _folder: Any = None

    def __setitem__(self, clip: int, states: Tensor) -> None:
        if clip in self._kept or (
            clip not in self._files and self.bytes + states.nbytes <= IN_MEMORY_BYTES
        ):
            self.bytes += 0 if clip in self._kept else states.nbytes
            self._kept[clip] = states
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="edgewhisper-states-")
        self._files.add(clip)
        torch.save(states, self._file(clip))

    def __getitem__(self, clip: int) -> Tensor:
        return self._kept[clip] if clip in self._kept else torch.load(self._file(clip))

    def pop(self, clip: int) -> Tensor | None:
        """Remove and return the states of a clip, None if there are none."""
        if clip in self._kept:
            states = self._kept.pop(clip)
            self.bytes -= states.nbytes
            return states
        if clip not in self._files:
            return None
        self._files.remove(clip)
        return torch.load(self._file(clip))

    def __len__(self) -> int:
        return len(self._kept) + len(self._files)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted([*self._kept, *self._files]))

    def _file(self, clip: int) -> Path:
        return Path(self._folder.name) / f"{clip}.pt"


# ------------------------------------------------------------------------------ running the model


def stem(model: "WhisperForConditionalGeneration", features: Tensor) -> Tensor:
    """Return the input states of the encoder's first branch for log-mel features (1, mels,
    frames)."""
    encoder = model.model.encoder
    x = functional.gelu(encoder.conv1(features))
    return placed(encoder, functional.gelu(encoder.conv2(x)).transpose(1, 2))


def embedded(model: "WhisperForConditionalGeneration", tokens: Tensor) -> Tensor:
    """Return the input states of the decoder's first branch for tokens (1, n)."""
    decoder = model.model.decoder
    return decoder.embed_tokens(tokens) + decoder.embed_positions.weight[: tokens.shape[1]]


def causal_mask(lengths: Sequence[int]) -> Tensor:
    """Return the mask (1, 1, n, n) of texts of these lengths, one after another in one sequence of
    n tokens: 0 for the token itself and for earlier tokens of its text, -inf for all others."""
    text = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (text[:, None] == text).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]


def normed(model: nn.Module, branch: Branch, x: Tensor) -> Tensor:
    """Return the input of a branch's first linear layer."""
    layer = branch.layer_of(model)
    if branch.kind == "ffn":
        return layer.final_layer_norm(x)
    return getattr(layer, f"{branch.kind}_layer_norm")(x)


def run(
    model: nn.Module,
    branch: Branch,
    x: Tensor,
    encoded: Tensor | None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return the output of a branch for states x (1, n, d_model), without the residual.

    The states of the decoder may be those of several texts of these `lengths`, one after another.
    Cross-attention then computes the keys and values of the clip once for all of them.
    """
    layer, y = branch.layer_of(model), normed(model, branch, x)
    if branch.kind == "ffn":
        return layer.fc2(layer.activation_fn(layer.fc1(y)))
    if branch.kind == "encoder_attn":
        mask = score_mask(model, branch, encoded)
        return layer.encoder_attn(y, key_value_states=encoded, attention_mask=mask)[0]
    return layer.self_attn(y, attention_mask=score_mask(model, branch, x, lengths))[0]


def score_mask(
    model: nn.Module, branch: Branch, source: Tensor, lengths: Sequence[int] | None = None
) -> Tensor | None:
    """Return what is added to the scores of a branch's attention to the states `source` (1, m,
    d_model): the causal mask in the decoder, the weights of encoder positions otherwise."""
    if branch.side == "decoder" and branch.kind == "self_attn":
        return causal_mask(lengths or [source.shape[1]]).to(source)
    return score_weights(model.model.encoder, source)


def run_few(model: nn.Module, branch: Branch, x: Tensor, encoded: Tensor) -> Tensor:
    """Return the output of a branch of the decoder as `run` does, with `attend_few` if it suits."""
    if branch.kind == "encoder_attn" and x.shape[1] <= FEW:
        attention = branch.attention_of(model)
        linears = attention.k_proj, attention.v_proj
        if all(linear.weight.shape[1] == encoded.shape[2] for linear in linears):
            weights = score_weights(model.model.encoder, encoded)
            return attend_few(attention, normed(model, branch, x), encoded, weights)
    return run(model, branch, x, encoded)


def attend_few(attention: Any, y: Tensor, encoded: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the output (1, n, d_model) of cross-attention for few tokens y (1, n, d_model), given
    the weights (1, 1, 1, positions) of the encoder's states.

    It multiplies queries and attention with the weights of keys and values, instead of all encoder
    positions: q^T (W x) = (W^T q)^T x. The bias of keys adds the same to all scores of a query,
    which a softmax ignores.
    """
    heads, x = attention.num_heads, encoded[0]  # (positions, d_model)
    keys, values = (
        p.weight.to(y).unflatten(0, (heads, -1)) for p in (attention.k_proj, attention.v_proj)
    )
    queries = attention.q_proj(y[0]) * attention.scaling
    queries = queries.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, n, k)
    scores = queries @ keys @ x.T  # (heads, n, positions)
    shares = (scores if weights is None else scores + weights[0]).softmax(-1)
    attended = (shares @ x @ values.mT).transpose(0, 1).flatten(1)  # (n, heads * v)
    return attention.out_proj(attended + attention.v_proj.bias.to(y))[None]


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which each call of the module appends its input."""
    recorded: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
    with removed_after(hook):
        yield recorded


@torch.no_grad()
def last_states(
    model: "WhisperForConditionalGeneration",
    branch: Branch,
    x: Tensor,
    tokens: Tensor,
    encoded: Tensor | None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return the decoder's last states (n, d_model), which `proj_out` converts to logits.

    x are the output states of `branch`. For a branch of the encoder, the decoder reads `tokens`
    (1, n). For a branch of the decoder, it reads the encoder's output `encoded`, and x may be the
    states of several texts of these `lengths`.
    """
    branches = branches_of(model, branch.side)
    for later in branches[branches.index(branch) + 1 :]:
        x = x + run(model, later, x, encoded, lengths)
    if branch.side == "encoder":
        encoded, x = model.model.encoder.layer_norm(x), embedded(model, tokens)
        for later in branches_of(model, "decoder"):
            x = x + run_few(model, later, x, encoded)
    return model.model.decoder.layer_norm(x)[0]
