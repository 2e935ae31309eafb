"""The two published inference stacks, and every place where they differ, in one table.

Weights are the same; diffusers and NVlabs' own code run them a little differently and paint
different pictures.  A Pipeline follows one of them (docs/numerics.md 1.5, 4.5, 6).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stack:
    """Fields are chosen by checkpoint format and can be overridden with `dataclasses.replace`."""

    name: str
    negative_uses_prompt_mask: bool  # whose mask the unconditional half attends with
    lower_case: bool  # prompts are lower-cased before tokenising
    strip_flags: bool  # a prompt ends at its first --ar, --hw or --aspect_ratio
    chi_double_quotes: bool  # "Enhanced prompt" in the instruction is in double quotes
    attention_eps: float  # denominator of the linear attention
    cross_norm_eps: float  # RMSNorm of query and key in cross-attention, where there is one
    integer_time: bool  # the time embedding truncates t
    clamp: bool  # attention output clipped to the range of float16 whatever its dtype
    flow_shift: float | None  # None: the checkpoint's scheduler's (3, and 6 at 4K, if it has none)
    pag_above: float  # perturbed-attention guidance acts at larger scales only
    pag_layers: tuple  # where it does unless the caller says otherwise

    def sana_fields(self, guidance_embed=False):
        """The overrides that this stack puts on a `Sana` module.

        SANA-Sprint's times lie between 0 and 1 in both stacks, and neither truncates them.
        """
        return {
            "attention_eps": self.attention_eps,
            "cross_norm_eps": self.cross_norm_eps,
            "integer_time": self.integer_time and not guidance_embed,
            "clamp": self.clamp,
        }


DIFFUSERS = Stack(
    name="diffusers",
    negative_uses_prompt_mask=False,
    lower_case=True,
    strip_flags=False,
    chi_double_quotes=False,
    attention_eps=1e-15,
    cross_norm_eps=1e-5,
    integer_time=False,
    clamp=False,
    flow_shift=None,
    pag_above=0.0,
    pag_layers=(0,),
)

NVLABS = Stack(
    name="nvlabs",
    negative_uses_prompt_mask=True,
    lower_case=False,
    strip_flags=True,
    chi_double_quotes=True,
    attention_eps=1e-8,
    cross_norm_eps=1e-6,
    integer_time=True,
    clamp=True,
    flow_shift=None,
    pag_above=1.0,
    pag_layers=(8,),
)

STACKS = {stack.name: stack for stack in (DIFFUSERS, NVLABS)}
