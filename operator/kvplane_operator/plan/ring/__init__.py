"""What should be of a service of ring groups: pure, as all of the plan.

``groups`` are what there is, as values; ``size``, ``scale``, ``rollout``, ``restarts`` and ``stuck`` each decide one thing
about them; ``pods`` and ``children`` are the manifests; ``status`` tells; ``service`` puts them together.
"""
