"""The slow twin: one AdamW step with p-norm decay, written down from the equations, one number at a time in float64."""

import math
import sys


class ReferenceLpAdamW:
    """arXiv 2404.10824 with AdamW inside, for one list of weights.

    Trimming, importance and frozen zeros are ours: weights with `r` not below `threshold` are exempt, `r = |w| * h`,
    and with `freeze_zeros` a weight that is zero stays zero. `post_step` takes `|w_hat|` for `|w|`; with `s_rate` below
    1, `s` follows `r ** (2 - p)`, moved first and then used.
    """

    def __init__(
        self,
        weights,
        lr,
        betas,
        eps,
        weight_decay,
        p,
        lp_lambda,
        freeze_zeros=False,
        threshold=None,
        h=None,
        post_step=False,
        s_rate=1.0,
    ):
        self.w = [float(w) for w in weights]
        self.m = [0.0] * len(self.w)
        self.v = [0.0] * len(self.w)
        self.t = 0
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.p, self.lp_lambda, self.freeze_zeros = p, lp_lambda, freeze_zeros
        self.post_step, self.s_rate = post_step, s_rate
        self.s = [None] * len(self.w)
        self.threshold = math.inf if threshold is None else threshold
        self.h = [1.0] * len(self.w) if h is None else [float(x) for x in h]

    def step(self, grads):
        self.t += 1
        beta1, beta2 = self.betas
        for i, g in enumerate(float(x) for x in grads):
            w = self.w[i]
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g * g
            m_hat = self.m[i] / (1 - beta1**self.t)
            v_hat = self.v[i] / (1 - beta2**self.t)
            u = m_hat / (math.sqrt(v_hat) + self.eps) + self.weight_decay * w
            w_hat = w - self.lr * u
            r = abs(w_hat if self.post_step else w) * self.h[i]
            self.w[i] = w_hat / (self.denominator(r) if self.s_rate == 1 else self.denominator_by_s(i, r))
            if self.freeze_zeros and w == 0:
                self.w[i] = 0.0

    def denominator(self, r):
        if self.lr * self.lp_lambda == 0 or r >= self.threshold:
            return 1.0
        if r == 0 and self.p != 2:
            return math.inf if self.p < 2 else 1.0
        try:
            return 1.0 + self.lr * self.lp_lambda * r ** (self.p - 2)
        except OverflowError:
            return math.inf

    def denominator_by_s(self, i, r):
        if self.lr * self.lp_lambda == 0:
            return 1.0
        size = r ** (2 - self.p) if r > 0 or self.p <= 2 else sys.float_info.max
        self.s[i] = size if self.s[i] is None else self.s[i] + self.s_rate * (size - self.s[i])
        if r >= self.threshold:
            return 1.0
        return math.inf if self.s[i] == 0 else 1.0 + self.lr * self.lp_lambda / self.s[i]
