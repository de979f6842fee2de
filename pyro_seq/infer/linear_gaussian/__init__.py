"""Recursions of linear-Gaussian models, on matrices.

Each step is a joint Gaussian of u = (state before, latents, data) given the state before, and an affine map to the state
after (:class:`~pyro_seq.infer.linear.LinearStep`). The forward pass needs no more of it than the joint of (state after,
data). Covariances and gains do not depend on the data, only on which of it is missing: they are computed once for all
sequences with the same gaps, and no more once they stand still. What is left is a linear recursion for the means.

A diffuse first state is carried as further columns of the mean, its coefficients; what the data says of them is a Gaussian
likelihood, and the limit of an infinite prior variance is taken in closed form (Rosenberg, *Random coefficients models*,
1973; de Jong, *The diffuse Kalman filter*, 1991).
"""

from pyro_seq.infer.linear_gaussian.backward import Backward, Joint
from pyro_seq.infer.linear_gaussian.diffuse import take_out_vague
from pyro_seq.infer.linear_gaussian.forward import Forward
from pyro_seq.infer.linear_gaussian.steps import Carry, StepJoint

__all__ = ["Backward", "Carry", "Forward", "Joint", "StepJoint", "take_out_vague"]
