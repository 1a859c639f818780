"""The merge engine: recipe, checkpoint index, plan, methods, execution, publishing.

Pure Python and torch: knows nothing of Ray, HTTP or databases. Importing it loads no torch::

    from merging.local_run import run_plan
    from merging.options import MergeOptions
    from merging.plan.planner import make_plan
    from merging.recipe import parse_recipe
    from merging.storage.router import open_storage

    storage = open_storage()
    plan = make_plan(parse_recipe(text), storage, MergeOptions(), "s3://models/merged")
    report = run_plan(plan, storage)
"""
