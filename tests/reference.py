"""The slow twin: one AdamW step with p-norm decay, written down from the equations, one number at a time in float64."""

import math


class ReferenceLpAdamW:
    """arXiv 2404.10824 with AdamW inside, for one list of weights.

    Trimming, importance and frozen zeros are ours: weights with `r` not below `threshold` are exempt, `r = |w| * h`,
    and with `freeze_zeros` a weight that is zero stays zero.
    """

    def __init__(self, weights, lr, betas, eps, weight_decay, p, lp_lambda, freeze_zeros=False, threshold=None, h=None):
        self.w = [float(w) for w in weights]
        self.m = [0.0] * len(self.w)
        self.v = [0.0] * len(self.w)
        self.t = 0
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.p, self.lp_lambda, self.freeze_zeros = p, lp_lambda, freeze_zeros
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
            self.w[i] = w_hat / self.denominator(abs(w) * self.h[i])
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
