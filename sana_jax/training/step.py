"""One training step: loss, gradient, update, or nothing at all where a number is not finite.

Shapes: b rows of the global batch, k microbatches.
"""

import jax
import jax.numpy as jnp

from sana_jax.training.objectives.terms import Frozen
from sana_jax.training.optimizer import merge, norm, split

BINS = 10  # of the noise level, for the loss by time


def make_step(model, objective, tx, optim, frozen_modules, seed):
    """The function (state, frozen_params, batch) -> (state, metrics), to be jitted by the caller.

    Args:
      model: Linen module.
      objective: see `training.objectives`.
      tx: what `optimizer.make` returned.
      optim: with `accumulate` (microbatches) and `ema` (decay or None).
      frozen_modules: `Frozen.modules`.
      seed: of everything random in the loss.

    `batch` is a dict of arrays with leading axis b, among them `position` [b] uint32, the global number
    of each row, and `weight` [b], 0 for rows that count for nothing.  `frozen_params` is `Frozen.params`.
    Where loss, gradient or update is not finite, parameters, average and optimizer stay bit for bit.

    metrics, all float32: loss, grad_norm (before clipping), lr, weight (sum), finite, skipped,
    skipped_in_row; time_loss and time_count [10] by noise level and the means of the objective's extras.
    """

    def summed(trained, frozen, frozen_params, batch):
        """(sum of weight * loss, terms) of some rows."""
        key = jax.random.key(seed)
        keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(batch["position"])
        terms = objective(model, Frozen(frozen_modules, frozen_params), merge(trained, frozen), batch, keys)
        return jnp.sum(counted(terms.loss, terms.weight)), terms

    def gradients(trained, *rest):
        (_, terms), grads = jax.value_and_grad(summed, has_aux=True)(trained, *rest)
        return grads, terms

    def step(state, frozen_params, batch):
        trained, frozen = split(state.params, tx.trained)
        if optim.accumulate == 1:
            grads, terms = gradients(trained, frozen, frozen_params, batch)
        else:

            def add(total, part):
                grads, terms = gradients(trained, frozen, frozen_params, part)
                return jax.tree.map(jnp.add, total, grads), terms

            grads, terms = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), parts(batch, optim.accumulate))
            terms = jax.tree.map(jnp.ravel, terms)
        total = jnp.sum(terms.weight)
        share = 1 / jnp.where(total > 0, total, 1)
        grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
        loss = jnp.sum(counted(terms.loss, terms.weight)) * share
        grad_norm = norm(grads)

        updates, opt_state = tx.update(grads, state.opt_state, trained)
        new = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype), trained, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(new)
        applied = finite & (total > 0)  # a batch of placeholders teaches nothing

        def chosen(new, old):
            return jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)

        params = merge(chosen(new, trained), frozen)
        ema = state.ema
        if ema is not None:
            moved = jax.tree.map(lambda e, p: e + (1 - optim.ema) * (p - e), ema, params)
            ema = chosen(moved, ema)
        after = state.replace(
            step=state.step + 1,
            params=params,
            ema=ema,
            opt_state=chosen(opt_state, state.opt_state),
            skipped=state.skipped + 1 - applied.astype(jnp.int32),
            skipped_in_row=jnp.where(applied, 0, state.skipped_in_row + 1 - finite.astype(jnp.int32)),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": tx.learning_rate(state.step - state.skipped),
            "weight": total,
            "finite": finite,
            "skipped": after.skipped,
            "skipped_in_row": after.skipped_in_row,
            **extras(terms),
        }
        return after, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return step


def counted(loss, weight):
    """weight * loss, and 0 where the weight is 0, whatever the loss."""
    return jnp.where(weight > 0, loss * weight, 0)


def parts(batch, count):
    """[b ...] -> [count b/count ...].  Every count-th row, so that all devices keep their own."""
    return {name: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1) for name, a in batch.items()}


def all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def extras(terms):
    """Weighted means of what else an objective says; the loss by noise level where it says "sigma"."""
    weight, extra = terms.weight, dict(terms.extra)
    found = {}
    if "sigma" in extra:
        number = jnp.clip((extra.pop("sigma") * BINS).astype(jnp.int32), 0, BINS - 1)
        member = (number[:, None] == jnp.arange(BINS)) & (weight > 0)[:, None]
        count = member.astype(jnp.float32).sum(axis=0)
        lost = jnp.where(member, terms.loss[:, None], 0).sum(axis=0)
        found = {"time_count": count, "time_loss": lost / jnp.maximum(count, 1)}
    total = jnp.maximum(weight.sum(), 1e-30)
    return found | {name: counted(value, weight).sum() / total for name, value in extra.items()}
