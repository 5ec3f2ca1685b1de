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
from transformers.models.mamba.modeling_mamba import MambaMixer, apply_mask_to_padding_states, causal_conv1d_fn

from .selective_scan import scan_backend, selective_scan


class SelectiveScanMixer(MambaMixer):
    """`MambaMixer` whose recurrence runs in `selective_scan`.

    With a cache that already holds a state, any number of new tokens continues from it. Padding in a continued chunk
    must be on the left and marked in `attention_mask`: there it leaves both states as they are.
    """

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
            attention_mask (`torch.Tensor`, *optional*): 1 for tokens and 0 for padding, `(batch, length)`; a longer one
                is taken to cover the tokens behind the cached state too, and its last `length` columns are used.

        Returns:
            `(batch, length, hidden_size)` in the dtype of `hidden_states`.

        Raises:
            ValueError: `attention_mask` has fewer columns than there are tokens.
        """
        length, dtype = hidden_states.shape[1], hidden_states.dtype
        state = None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx)
        if attention_mask is not None and attention_mask.shape[1] != length:
            if attention_mask.shape[1] < length:
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} columns for {length} tokens; pass one column for "
                    "every token"
                )
            attention_mask = attention_mask[:, -length:]
        if scan_backend(hidden_states.device) == "mamba_ssm" and (state is None or length == 1) or kwargs:
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)

        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, D) each
        padding = None if attention_mask is None else attention_mask == 0  # (B, L)
        continued = state is not None
        x = x.transpose(1, 2)  # (B, D, L)
        if cache_params is not None:
            if continued and padding is not None:
                x = self._extend_conv_state(x, cache_params, padding)  # (B, D, K + L)
            else:
                x = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        x = causal_conv1d_fn(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
        x = apply_mask_to_padding_states(x[:, :, -length:].transpose(1, 2), attention_mask)  # (B, L, D)

        time_step, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
        delta = F.linear(time_step, self.dt_proj.weight)  # (B, L, D)
        if continued and padding is not None:
            # A step of size zero keeps the state; softplus maps the lowest number to zero.
            delta = delta.masked_fill(padding.unsqueeze(-1), torch.finfo(delta.dtype).min)
        out = selective_scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=self.D.float(),
            z=gate.transpose(1, 2),
            delta_bias=None if self.dt_proj.bias is None else self.dt_proj.bias.float(),
            delta_softplus=True,
            initial_state=state.clone() if continued and torch.is_grad_enabled() else state,
            return_last_state=cache_params is not None,
        )
        if cache_params is not None:
            out, last_state = out
            cache_params.update_recurrent_state(last_state, self.layer_idx)
        return self.out_proj(out.transpose(1, 2).to(dtype))  # (B, L, hidden_size)

    def _extend_conv_state(self, x: Tensor, cache_params: Cache, padding: Tensor) -> Tensor:
        """The cached inputs followed by the new ones `(B, D, K + L)`, with each row's padding moved to the front.

        So the convolution meets a row's first new token right after its cached ones, and the padding never becomes
        part of the cached window.
        """
        full = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        cached = full.shape[-1] - x.shape[-1]
        pads = padding.sum(1, keepdim=True)  # (B, 1)
        at = torch.arange(full.shape[-1], device=x.device)  # (K + L,)
        source = torch.where(at < pads + cached, (at - pads) % full.shape[-1], at)  # (B, K + L)
        full = full.gather(-1, source.unsqueeze(1).expand_as(full))
        window = cache_params.get_conv_state(self.layer_idx)
        window.copy_(full[..., -window.shape[-1] :])
        return full


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
            adapted += 1
    return adapted
