"""Pictures of the shipped dashboards: ``make dashboards-preview``."""
