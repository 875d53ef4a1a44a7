"""The methods that `benchmarks.accuracy` compares, all on the same features of one backbone."""

from benchmarks.baselines import (
    autoencoder,
    linear,
    memory,
    patchcore,
    promptad,
    prompts,
    subspace,
    winclip,
)
from benchmarks.baselines.support import Method

METHODS: tuple[Method, ...] = (
    Method(
        rows=("apt", "apt-alone"),
        about="learned prompts guided by SMGS",
        fit=prompts.fit_apt,
    ),
    Method(
        rows=("coop", "coop-alone"),
        about="learned prompts without SMGS",
        fit=prompts.fit_coop,
    ),
    Method(
        rows=("random-text", "random-text-alone"),
        about="the same through a text encoder of random weights",
        fit=prompts.fit_random_text,
    ),
    Method(
        rows=("free", "free-alone"),
        about="two free directions in the joint space",
        fit=prompts.fit_free,
    ),
    Method(
        rows=("linear", "linear-alone"),
        about="logistic regression on patch tokens",
        fit=linear.fit,
    ),
    Method(
        rows=("handwritten", "handwritten-alone"),
        about="written prompts that fit any product",
        fit=prompts.fit_handwritten,
    ),
    Method(
        rows=("promptad", "promptad-alone"),
        about="PromptAD's learning from normal images",
        fit=promptad.fit,
    ),
    Method(
        rows=("winclip", "winclip-zero"),
        about="WinCLIP, few-shot and zero-shot",
        fit=winclip.fit,
        uses_windows=True,
    ),
    Method(
        rows=("reference",),
        about="APT's memory by APT's rule, without prompts",
        fit=prompts.fit_reference,
    ),
    Method(
        rows=("memory",),
        about="nearest support patch",
        fit=memory.fit_memory,
    ),
    Method(
        rows=("anomalydino",),
        about="nearest patch of the support images in 8 rotations",
        fit=memory.fit_anomalydino,
    ),
    Method(
        rows=("patchcore",),
        about="PatchCore: coreset of a tenth, Euclidean, its own image score",
        fit=patchcore.fit,
    ),
    Method(
        rows=("subspace",),
        about="SubspaceAD: what principal components leave unexplained",
        fit=subspace.fit,
    ),
    Method(
        rows=("autoencoder",),
        about="denoising autoencoder of patch features",
        fit=autoencoder.fit,
    ),
)
