"""Losses over pairs of answers, and over labelled ones, each one pure function of their log-probabilities: one loss a
pair or answer.

The name of a function is the name of the loss in a config, its keyword-only parameters are the keys beside the name,
and their annotations the limits of these. A function of `PairLogps` or of `LabelledLogps` (single answers) needs a
reference model, one of `PolicyPairs` does not. The objective sums what they return over the pairs or answers that are
present and divides by their number in the global batch; the term on the chosen answers alone that some papers add
(`sft`) is another term of that sum.

Definitions, parameter names and defaults are those of TRL. In the formulas c and r are the log-ratios of the chosen and
the rejected answer, log pi(y|x) - log pi_ref(y|x), |y| is the number of trained tokens and s the logistic function.
Where no pair is present a loss is finite, without gradient, and has no influence on other places.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32
from pydantic import Field

from posttrain.records import LabelledLogps, PairLogps, PolicyPairs

Beta = Annotated[
    float, Field(gt=0, description="Scale of the rewards: the larger, the less the model leaves the reference.")
]
LabelNoise = Annotated[
    float, Field(ge=0, lt=0.5, description="Assumed probability that the two answers of a pair were interchanged.")
]
Divergence = Annotated[
    Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
    Field(description="The f-divergence from the reference that the rewards are derived from."),
]
AlphaDivergence = Annotated[
    float, Field(description="alpha of alpha_divergence: 1 is the reverse KL, 0 the forward KL; not used elsewhere.")
]
TargetMargin = Annotated[float, Field(ge=0, description="gamma: by how much the chosen reward should be the larger.")]
LabelWeight = Annotated[
    float,
    Field(
        gt=0,
        description="Factor of the losses of answers with this label; best if desirable_weight x desirable answers is "
        "1 to 4/3 of undesirable_weight x undesirable ones (section 4.2 of the paper).",
    ),
]

Losses = Float32[Array, " P"]
"""One loss a pair or labelled answer, at its place."""

# The largest exponent that is not cut: a difference of two such powers is finite in float32, also times a beta.
LARGEST_EXPONENT = 80.0

Loss = TypeVar("Loss", bound=Callable[..., Losses])


def whole_batch(loss: Loss) -> Loss:
    """Marks a loss that compares pairs with each other: it must get all pairs of a step in one call."""
    vars(loss)["whole_batch"] = True
    return loss


def with_sft(weight: float) -> Callable[[Loss], Loss]:
    """Marks a loss whose paper adds the negative log-likelihood of the chosen answers, by default so many times."""

    def mark(loss: Loss) -> Loss:
        vars(loss)["sft_weight"] = weight
        return loss

    return mark


def with_kl(loss: Loss) -> Loss:
    """Marks a loss of labelled answers that compares them with the mean log-ratio of answers to other prompts."""
    vars(loss)["with_kl"] = True
    return loss


# Losses of the difference of two scores, which are the log-ratios or their image under another f-divergence.


def sigmoid(
    pairs: PairLogps,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelNoise = 0.0,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: AlphaDivergence = 0.5,
) -> Losses:
    """DPO (arXiv:2305.18290, eq. 7): -log s(beta (c - r)).

    With `label_smoothing` e it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"):
    -(1 - e) log s(beta (c - r)) - e log s(-beta (c - r)). With another divergence than the reverse KL it is f-DPO
    (arXiv:2309.16240), whose scores f'(pi / pi_ref) take the place of c and r, here and in the other losses.
    """
    chosen, rejected = _scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    return _noisy_logistic(beta * (chosen - rejected), label_smoothing)


def sigmoid_norm(
    pairs: PairLogps,
    *,
    beta: Beta = 0.1,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: AlphaDivergence = 0.5,
) -> Losses:
    """Length-normalised DPO (Tulu 3, arXiv:2411.15124): -log s(beta (c / |y_c| - r / |y_r|))."""
    chosen, rejected = _scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = _per_token(pairs, chosen, rejected)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def hinge(
    pairs: PairLogps,
    *,
    beta: Beta = 0.1,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: AlphaDivergence = 0.5,
) -> Losses:
    """SLiC's hinge over log-ratios (arXiv:2305.10425, arXiv:2309.06657): max(0, 1 - beta (c - r))."""
    chosen, rejected = _scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


def ipo(
    pairs: PairLogps,
    *,
    beta: Beta = 0.1,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: AlphaDivergence = 0.5,
) -> Losses:
    """IPO (arXiv:2310.12036, eq. 17; its tau is `beta`): (c / |y_c| - r / |y_r| - 1 / (2 beta))^2.

    Per token, as its authors ran it, though the paper does not say so.
    """
    chosen, rejected = _scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = _per_token(pairs, chosen, rejected)
    return jnp.square(chosen - rejected - 1.0 / (2.0 * beta))


def exo_pair(
    pairs: PairLogps,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float,
        Field(
            gt=0,
            lt=0.5,
            validate_default=True,
            description="Probability that the target leaves to the rejected answer; must be given, the paper has 1e-3.",
        ),
    ] = 0.0,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: AlphaDivergence = 0.5,
) -> Losses:
    """EXO over pairs (arXiv:2402.00856, eq. 16): KL(q || (1 - e, e)) with q = (s(d), s(-d)), d = beta (c - r).

    The default of `label_smoothing` e is not valid: the divergence from (1, 0) is infinite, so e must be chosen.
    """
    chosen, rejected = _scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    logits = beta * (chosen - rejected)
    surplus_chosen = jax.nn.log_sigmoid(logits) - math.log1p(-label_smoothing)
    surplus_rejected = jax.nn.log_sigmoid(-logits) - math.log(label_smoothing)
    return jax.nn.sigmoid(logits) * surplus_chosen + jax.nn.sigmoid(-logits) * surplus_rejected


def robust(
    pairs: PairLogps,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelNoise = 0.0,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: AlphaDivergence = 0.5,
) -> Losses:
    """Robust DPO (arXiv:2403.00409): [-(1 - e) log s(d) + e log s(-d)] / (1 - 2 e), d = beta (c - r).

    Its expectation under labels that are interchanged with probability e is the DPO loss of the true labels.
    """
    chosen, rejected = _scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    logits = beta * (chosen - rejected)
    kept = (1.0 - label_smoothing) * jax.nn.log_sigmoid(logits)
    interchanged = label_smoothing * jax.nn.log_sigmoid(-logits)
    return (interchanged - kept) / (1.0 - 2.0 * label_smoothing)


def discopop(
    pairs: PairLogps,
    *,
    beta: Beta = 0.1,
    discopop_tau: Annotated[float, Field(gt=0, description="Temperature of the blend of the two losses.")] = 0.05,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: AlphaDivergence = 0.5,
) -> Losses:
    """DiscoPOP's log-ratio modulated loss (arXiv:2406.08414, eq. 5), d = beta (c - r):

    (1 - s(d / tau)) (-log s(d)) + s(d / tau) exp(-d).
    """
    chosen, rejected = _scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    logits = beta * (chosen - rejected)
    logistic = jax.nn.sigmoid(-logits / discopop_tau) * -jax.nn.log_sigmoid(logits)
    # One exponential: exp(-d) alone overflows where its factor is 0.
    exponential = _cut_exp(jax.nn.log_sigmoid(logits / discopop_tau) - logits)
    return logistic + exponential


# Losses of each of the two log-ratios; a constant in both does not cancel, so they are tied to the reverse KL.


def nca_pair(pairs: PairLogps, *, beta: Beta = 0.1) -> Losses:
    """NCA over pairs (arXiv:2402.05369): -log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2."""
    chosen, rejected = _log_ratios(pairs)
    against = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * against


def bco_pair(pairs: PairLogps, *, beta: Beta = 0.1) -> Losses:
    """BCO over pairs (arXiv:2404.04656, without its reward shift): -log s(beta c) - log s(-beta r)."""
    chosen, rejected = _log_ratios(pairs)
    return -jax.nn.log_sigmoid(beta * chosen) - jax.nn.log_sigmoid(-beta * rejected)


def sppo_hard(pairs: PairLogps, *, beta: Beta = 0.1) -> Losses:
    """SPPO with certain preferences (arXiv:2405.00675, eq. 4.7): (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2."""
    chosen, rejected = _log_ratios(pairs)
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def apo_zero(pairs: PairLogps, *, beta: Beta = 0.1) -> Losses:
    """APO-zero (arXiv:2408.06266, eq. 7): 1 - s(beta c) + s(beta r). For chosen answers better than the model's."""
    chosen, rejected = _log_ratios(pairs)
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(pairs: PairLogps, *, beta: Beta = 0.1) -> Losses:
    """APO-down (arXiv:2408.06266, eq. 8): s(beta c) + 1 - s(beta (c - r)). For answers that are all worse than the
    model's own."""
    chosen, rejected = _log_ratios(pairs)
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


# Losses that match distributions over the batch.


@whole_batch
def aot(pairs: PairLogps, *, beta: Beta = 0.1, label_smoothing: LabelNoise = 0.0) -> Losses:
    """AOT for pairs (arXiv:2406.05882): DPO's loss between equal ranks instead of equal pairs.

    The k-th smallest log pi(y_c) - log pi(y_r) of the batch is compared with the k-th smallest of the reference. The
    loss of a rank stands at the pair that has it for the model.
    """
    policy = _present(pairs, pairs.chosen - pairs.rejected)
    reference = _present(pairs, pairs.ref_chosen - pairs.ref_rejected)
    return _noisy_logistic(beta * (policy - _of_equal_rank(reference, policy, pairs)), label_smoothing)


@whole_batch
def aot_unpaired(pairs: PairLogps, *, beta: Beta = 0.1, label_smoothing: LabelNoise = 0.0) -> Losses:
    """AOT for separate samples of good and bad answers (arXiv:2406.05882): the k-th smallest c against the k-th
    smallest r of the batch. The loss of a rank stands at the pair whose chosen answer has it."""
    chosen, rejected = _log_ratios(pairs)
    return _noisy_logistic(beta * (chosen - _of_equal_rank(rejected, chosen, pairs)), label_smoothing)


# Losses without a reference.


@with_sft(1.0)
def cpo(pairs: PolicyPairs, *, beta: Beta = 0.1, label_smoothing: LabelNoise = 0.0) -> Losses:
    """CPO's preference term (arXiv:2401.08417, eq. 3): DPO's loss with log pi(y|x) in place of the log-ratios.

    The paper adds the chosen answers' `sft` with weight 1.
    """
    chosen, rejected = _present(pairs, pairs.chosen), _present(pairs, pairs.rejected)
    return _noisy_logistic(beta * (chosen - rejected), label_smoothing)


def simpo(
    pairs: PolicyPairs, *, beta: Beta = 0.1, simpo_gamma: TargetMargin = 0.5, label_smoothing: LabelNoise = 0.0
) -> Losses:
    """SimPO (arXiv:2405.14734, eq. 6): -log s(beta (log pi(y_c) / |y_c| - log pi(y_r) / |y_r|) - gamma).

    The paper's beta is 2 to 2.5 and its gamma 0.3 to 1.6; it has no smoothing.
    """
    chosen, rejected = _per_token(pairs, pairs.chosen, pairs.rejected)
    return _noisy_logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def alphapo(
    pairs: PolicyPairs,
    *,
    beta: Beta = 0.1,
    simpo_gamma: TargetMargin = 0.5,
    alpha: Annotated[float, Field(description="Shape of the reward; 0 is SimPO.")] = 0.0,
    label_smoothing: LabelNoise = 0.0,
) -> Losses:
    """AlphaPO (arXiv:2501.03884): SimPO with the reward (1 - p^-alpha) / alpha, p = pi(y)^(1 / |y|), for log p."""
    chosen, rejected = _per_token(pairs, pairs.chosen, pairs.rejected)
    margin = _power(chosen, -alpha) - _power(rejected, -alpha)
    return _noisy_logistic(beta * margin - simpo_gamma, label_smoothing)


@with_sft(1.0)
def orpo(pairs: PolicyPairs, *, beta: Beta = 0.1) -> Losses:
    """ORPO's odds-ratio term (arXiv:2403.07691, eq. 7), times its weight, the paper's lambda, which TRL calls beta:

    -beta log s(log odds(y_c) - log odds(y_r)), odds(y) = p / (1 - p), p = pi(y)^(1 / |y|). The paper adds the chosen
    answers' `sft` with weight 1.
    """
    chosen, rejected = _per_token(pairs, pairs.chosen, pairs.rejected)
    return -beta * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


# Losses of single answers that are labelled good or bad.


@with_kl
def kto(
    answers: LabelledLogps,
    *,
    beta: Beta = 0.1,
    desirable_weight: LabelWeight = 1.0,
    undesirable_weight: LabelWeight = 1.0,
) -> Losses:
    """KTO (arXiv:2402.01306, eq. 7): w_D (1 - s(beta (x - z))) of a desirable answer, w_U (1 - s(beta (z - x))) of an
    undesirable one, x its log-ratio and z the mean log-ratio of answers to other prompts, not below 0."""
    gain = beta * jnp.sign(answers.labels) * (answers.logps - answers.ref_logps - answers.kl)
    weights = jnp.where(answers.labels > 0, desirable_weight, undesirable_weight)
    return weights * jax.nn.sigmoid(-gain)


def apo_zero_unpaired(
    answers: LabelledLogps,
    *,
    beta: Beta = 0.1,
    desirable_weight: LabelWeight = 1.0,
    undesirable_weight: LabelWeight = 1.0,
) -> Losses:
    """APO-zero of single answers (arXiv:2408.06266): 1 - s(beta x) of a desirable one, s(beta x) of an undesirable
    one: KTO with z = 0."""
    return kto(
        replace(answers, kl=jnp.zeros_like(answers.kl)),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def _present(pairs: PolicyPairs, values: Losses) -> Losses:
    """0, and no gradient, where no pair is: whatever stands there cannot make a loss or a gradient infinite."""
    return jnp.where(pairs.present > 0, values, 0.0)


def _log_ratios(pairs: PairLogps) -> tuple[Losses, Losses]:
    """c and r."""
    return _present(pairs, pairs.chosen - pairs.ref_chosen), _present(pairs, pairs.rejected - pairs.ref_rejected)


def _per_token(pairs: PolicyPairs, chosen: Losses, rejected: Losses) -> tuple[Losses, Losses]:
    """Both values divided by the numbers of trained tokens."""
    return (
        _present(pairs, chosen / jnp.maximum(pairs.chosen_tokens, 1.0)),
        _present(pairs, rejected / jnp.maximum(pairs.rejected_tokens, 1.0)),
    )


def _scores(pairs: PairLogps, divergence: str, alpha: float) -> tuple[Losses, Losses]:
    """f'(pi / pi_ref) of both answers, up to a constant, which cancels in their difference (arXiv:2309.16240)."""
    score: Callable[[Losses], Losses] = {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: _power(x, -1.0),
        "js_divergence": lambda x: math.log(2.0) + jax.nn.log_sigmoid(x),
        "alpha_divergence": lambda x: _power(x, alpha - 1.0),
    }[divergence]
    chosen, rejected = _log_ratios(pairs)
    return score(chosen), score(rejected)


def _power(x: Losses, exponent: float) -> Losses:
    """(t^exponent - 1) / exponent of t = e^x, which tends to x for an exponent that tends to 0.

    Powers over e^LARGEST_EXPONENT are cut there, and have no gradient.
    """
    if abs(exponent) < 1e-6:
        return x
    return jnp.expm1(jnp.minimum(exponent * x, LARGEST_EXPONENT)) / exponent


def _cut_exp(x: Losses) -> Losses:
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT))


def _noisy_logistic(logits: Losses, noise: float) -> Losses:
    """Cross-entropy of s(logits) and the label 1, which is wrong with probability `noise`."""
    return -(1.0 - noise) * jax.nn.log_sigmoid(logits) - noise * jax.nn.log_sigmoid(-logits)


def _log_odds(x: Losses) -> Losses:
    """log(p / (1 - p)) of p = e^x, for p up to the largest float32 below 1."""
    x = jnp.minimum(x, -float(jnp.finfo(jnp.float32).eps))
    return x - jnp.log(-jnp.expm1(x))


def _of_equal_rank(others: Losses, values: Losses, pairs: PolicyPairs) -> Losses:
    """`others`, so rearranged that the k-th smallest of them stands where `values` has its k-th smallest.

    Only among places with a pair: the rest come last in both orders.
    """

    def order(x: Losses) -> Int32[Array, " P"]:
        return jnp.argsort(jnp.where(pairs.present > 0, x, jnp.inf))

    ranks = jnp.argsort(order(values))
    return others[order(others)][ranks]
