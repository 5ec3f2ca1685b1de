# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""transformers' Mamba mixer on our selective scan, and able to go on from a cached state with several tokens.

The weights, their names and everything around the mixer stay transformers' own: `use_selective_scan` only changes the
class of the mixers it finds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba.modeling_mamba import MambaMixer, apply_mask_to_padding_states, causal_conv1d_fn

from .causal_conv import causal_conv_silu, native_conv_step
from .selective_scan import scan_backend, selective_scan
from .selective_scan_native import native_forward


class SelectiveScanMixer(MambaMixer):
    """`MambaMixer` whose recurrence runs in `selective_scan`.

    With a cache that already holds a state, any number of new tokens continues from it. Padding in a continued chunk
    must be on the left and marked in `attention_mask`: there it leaves both states as they are.
    """

    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Mix along time.

        Args:
            hidden_states (`torch.Tensor`): `(batch, length, hidden_size)`.
            cache_params (`Cache`, *optional*): Continued from if it holds a state, and updated in place.
            attention_mask (`torch.Tensor`, *optional*): 1 for tokens and 0 for padding, `(batch, length)`. A longer
                one is taken to cover the tokens behind the cached state too; its last `length` columns are used.

        Returns:
            `(batch, length, hidden_size)` in the dtype of `hidden_states`.

        Raises:
            ValueError: `attention_mask` has fewer columns than there are tokens.
        """
        length = hidden_states.shape[1]
        window, state = self._cached_states(cache_params)  # (B, D, K), (B, D, N)
        if attention_mask is not None and attention_mask.shape[1] != length:
            if attention_mask.shape[1] < length:
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} columns for {length} tokens; pass one column for "
                    "every token"
                )
            attention_mask = attention_mask[:, -length:]
        backend = scan_backend(hidden_states.device)
        if (backend == "mamba_ssm" and (state is None or length == 1)) or kwargs:
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        native = backend == "native" and hidden_states.dtype == self.conv1d.weight.dtype == torch.float32
        may_step = native and state is not None and length == 1 and attention_mask is None
        if may_step and self._may_write_in_place(hidden_states, window, state):
            return self._step(hidden_states, window, state)
        return self._mix(hidden_states, cache_params, attention_mask, state, native)

    def _cached_states(self, cache_params: Cache | None) -> tuple[Tensor | None, Tensor | None]:
        """This layer's convolution window and recurrent state, the cache's own tensors, or None if there are none."""
        if cache_params is None or not cache_params.has_previous_state(self.layer_idx):
            return None, None
        layer = cache_params.layers[self.layer_idx]
        return layer.conv_states[0], layer.recurrent_states[0]

    def _mix(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None,
        attention_mask: Tensor | None,
        state: Tensor | None,
        native: bool,
    ) -> Tensor:
        """Any number of tokens, from `state` if there is one."""
        length, dtype = hidden_states.shape[1], hidden_states.dtype
        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        padding = None if attention_mask is None or state is None else attention_mask == 0  # (B, L)
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, D) each
        if cache_params is not None:
            x = cache_params.update_conv_state(
                x.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            ).transpose(1, 2)  # (B, K + L, D) when continued
            if padding is not None:
                x = self._move_padding(x, cache_params, padding)
        x = self._convolve(x, native)[:, -length:]
        x = apply_mask_to_padding_states(x, attention_mask)  # (B, L, D)

        time_step, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
        delta = F.linear(time_step, self.dt_proj.weight)  # (B, L, D)
        if padding is not None:
            # A step of size zero keeps the state; softplus maps the lowest number to zero.
            delta = delta.masked_fill(padding.unsqueeze(-1), torch.finfo(delta.dtype).min)
        out, last_state = selective_scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=self.D.float(),
            z=gate.transpose(1, 2),
            delta_bias=None if self.dt_proj.bias is None else self.dt_proj.bias.float(),
            delta_softplus=True,
            initial_state=state.clone() if state is not None and torch.is_grad_enabled() else state,
            return_last_state=True,
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(last_state, self.layer_idx)
        return self.out_proj(out.transpose(1, 2).to(dtype))  # (B, L, hidden_size)

    def _convolve(self, x: Tensor, native: bool) -> Tensor:
        """The causal convolution and its activation, `(B, L, D)` to `(B, L, D)`."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if native and x.dtype == torch.float32 and self.activation in ("silu", "swish"):
            return causal_conv_silu(x, weight, bias, native=True)
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation=self.activation).transpose(1, 2)

    def _move_padding(self, x: Tensor, cache_params: Cache, padding: Tensor) -> Tensor:
        """Cached and new inputs `(B, K + L, D)` with each row's padding moved to the front.

        So the convolution meets a row's first new token right after its cached ones, and the padding never becomes
        part of the cached window.
        """
        total = x.shape[1]
        cached = total - padding.shape[1]
        pads = padding.sum(1, keepdim=True)  # (B, 1)
        at = torch.arange(total, device=x.device)  # (K + L,)
        source = torch.where(at < pads + cached, (at - pads) % total, at)  # (B, K + L)
        x = x.gather(1, source.unsqueeze(-1).expand_as(x))
        window, _ = self._cached_states(cache_params)  # (B, D, K)
        window.copy_(x[:, -window.shape[-1] :].transpose(1, 2))
        return x

    def _may_write_in_place(self, hidden_states: Tensor, window: Tensor, state: Tensor) -> bool:
        """Whether compiled code may write the cached tensors: nothing traces or differentiates, and they are plain."""
        parameters = (self.conv1d.weight, self.A_log, self.D, self.dt_proj.bias)
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and type(hidden_states) is Tensor
            and self.activation in ("silu", "swish")
            and window.shape[-1] == self.conv_kernel_size
            and all(
                x.dtype == torch.float32 and x.is_contiguous() for x in (window, state, *parameters) if x is not None
            )
        )

    def _step(self, hidden_states: Tensor, window: Tensor, state: Tensor) -> Tensor:
        """One token `(B, 1, hidden_size)`; `window` and `state` are updated in place."""
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, 1, D) each
        x = native_conv_step(x[:, 0], window, self.conv1d.weight.view(-1, self.conv_kernel_size), self.conv1d.bias)
        x = x.unsqueeze(1)  # (B, 1, D)
        time_step, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
        out, _, _ = native_forward(
            x,
            F.linear(time_step, self.dt_proj.weight),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            gate,
            self.dt_proj.bias,
            initial_state=state,
            delta_softplus=True,
            last_state=state,
        )
        return self.out_proj(out)  # (B, 1, hidden_size)


def use_selective_scan(mamba: nn.Module) -> int:
    """Let every Mamba mixer inside `mamba` run on `selective_scan`, in place; weights and hooks are untouched.

    Args:
        mamba (`nn.Module`): A `MambaForCausalLM`, a `MambaModel` or any module that contains one.

    Returns:
        How many mixers were adapted by this call; mixers that were adapted before do not count.
    """
    adapted = 0
    for module in mamba.modules():
        if type(module) is MambaMixer:
            module.__class__ = SelectiveScanMixer
            if "_old_forward" in vars(module):  # accelerate keeps the forward that its hooks wrap on the instance
                module._old_forward = SelectiveScanMixer.forward.__get__(module)
            adapted += 1
    return adapted
