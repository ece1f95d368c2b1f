"""What a service's spec says of its scaling, and the one set of parameters that all services share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Parameters of the law, one set for all services, each chosen by its reason. ``bench.autoscaling.tuning`` tries others."""

    tick_seconds: float = 5.0
    """Between two decisions on a service that is used. A start takes tens of seconds: deciding more often finds nothing new. Who
    calls the law may leave one that is not used alone for longer, and decides at once when it is woken."""
    usable_start: float = 0.85
    """Share of a replica's KV memory that is planned with before anything was learned."""
    usable_least: float = 0.6
    usable_most: float = 0.92
    prefill_share: float = 0.85
    """Share of the learned prefill rate that is planned with."""
    noise_deviations: float = 1.0
    """Standard deviations of the demand's short noise that are kept free while no room is learned. At most 1: more could make
    less demand ask for more replicas."""
    unknown_startup_seconds: float = 120.0
    """How long a start takes before one was seen: a large model from a cached image."""
    panic_ratio: float = 1.5
    """Demand over ready replicas from which on it is an overload."""
    panic_shed: float = 0.02
    """Share of the requests that admission refuses, from which on it is an overload."""
    panic_misses: float = 0.05
    """Share of the demand that is forecast to find no room, from which on it is an overload."""
    panic_seconds: float = 10.0
    """How long an overload must last: one step of a busy engine is not one."""
    step_replicas: int = 4
    """Replicas that may be added within step_seconds whatever there is; more where that would not double it, as in a
    HorizontalPodAutoscaler."""
    step_seconds: float = 15.0
    down_share: float = 0.7
    """Of the replicas that stay, how much the demand may fill after scaling down. 1 - 0.7 is the room in which demand
    moves without a reversal."""
    forecast_quantile: float = 0.9
    """Of recent demand, what the forecast of that name expects, and what forecasts are judged by: at 0.9 a replica too few
    weighs nine times one too many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``spec.autoscaling`` of one service. Raises ValueError, with a sentence, for a field out of its bounds."""

    min_replicas: int = 1
    """Fewest while the service is used."""
    max_replicas: int
    scale_to_zero_after_seconds: int | None = None
    """Without a request for so long nothing runs; ``None``: never."""
    scale_down_window_seconds: int = 300
    """Replicas go only when none of the demand within so long needs them."""
    cost_of_miss: float = 4.0
    """How many replicas are worth keeping for a time to avoid being one short in it."""
    tuning: Tuning = Tuning()

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(
                f"min_replicas must be at least 1; it is {self.min_replicas}. Set scale_to_zero_after_seconds to let "
                "nothing run while nobody asks."
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas, {self.min_replicas}; it is {self.max_replicas}. Raise it, or "
                "lower min_replicas."
            )
        if self.scale_to_zero_after_seconds is not None and self.scale_to_zero_after_seconds < 1:
            raise ValueError(
                f"scale_to_zero_after_seconds must be at least 1; it is {self.scale_to_zero_after_seconds}. Leave it out to "
                "never scale to zero."
            )
        if self.scale_down_window_seconds < 0:
            raise ValueError(f"scale_down_window_seconds must be at least 0; it is {self.scale_down_window_seconds}.")
        if not self.cost_of_miss >= 0:
            raise ValueError(f"cost_of_miss must be at least 0; it is {self.cost_of_miss}.")
