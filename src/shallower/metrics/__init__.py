"""Importance of units; higher always means keep. One metric a file.

The framework supplies what the signature asks for, and makes the passes that this takes:

    before, after                           the stream around a unit or span, float32 [tokens, hidden]
    dot, before_l2, after_l2, change_l2     of these two: scalar product and Euclidean norms, float64; elementwise
    before_l1, after_l1, change_l1          sums of absolute values; a metric of these costs little for all spans, too
    before_before, before_after,            second moments over all tokens, float64 [width, width]
    after_after
    weights                                 a unit's parameters, float32
    gradients, fisher                       of the mean loss with respect to them; mean squares of each sequence's
    gate                                    derivative of the loss with respect to a factor on a unit's update
    units with losses or differences        the objective without each candidate, or its difference to the dense model
    rng                                     random.Random, seeded by the user

The first four are worked out in one forward pass, `gradients`, `fisher` and `gate` in one forward and backward pass,
for all metrics of a run. A trait `spans=True` scores spans, too, `positions="last"` reads last tokens only (both for
metrics of the stream), and `in_all=True` makes a metric of losses part of `--metric all`.

Those of these lines that are worked out in different ways (the stream, elementwise products, moments, weights, gates,
losses) are not asked for together; `units` and `rng` go with losses. Two options mean something to the framework:
`order` (`fisher` is None unless it is 2) and `width` (how many directions the stream is projected to for second
moments; 0 keeps them all).
"""
