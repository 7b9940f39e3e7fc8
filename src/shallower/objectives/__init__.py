"""What the whole model outputs with units removed, as one number a token; lower is better. One objective a file.

The framework supplies what the signature asks for: `logits`, `targets`, `dense_logits`, `hidden`, `dense_hidden`; or
`target_logits`, `log_normalizer`, `dense_mean_logit` and `dense_entropy`, for which it need not hold logits over the
whole vocabulary. An option `temperature` divides the logits of which these four are made.

Trait `floor=0.0`: no value is below it, but for rounding, so that exact searches may drop who has already lost.

Or one number a question, for an objective that asks for `log_likelihoods`, `tokens`, `bytes` or `gold` of choices: it
is calibrated on a file of questions instead of text (`task.py`).
"""
