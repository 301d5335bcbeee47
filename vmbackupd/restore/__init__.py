"""Restoring a backup: a plan that is checked before anything is written, targets of every kind, and the new domain.

``planner.make_plan`` turns a manifest and a request into a :class:`plan.RestorePlan`; ``execute.execute`` carries it
out.
"""
