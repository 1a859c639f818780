"""The integrations of a deployment, from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from merging.errors import Fault, MergeError
from service.integrations.base import Integration
from service.integrations.mlflow import Mlflow
from service.jobs.records import JobIntegration
from service.problems import RequestError
from service.settings import ENV_PREFIX, Settings


def make_integrations(settings: Settings) -> dict[str, Integration]:
    """Those that are configured, by name.

    Raises:
        MergeError: ``bad_setting``: jobs are to use one that is not.
    """
    found: dict[str, Integration] = {}
    if settings.mlflow_url:
        credentials = settings.mlflow_credentials
        secret = "" if credentials is None else credentials.get_secret_value()
        found["mlflow"] = Mlflow(settings.mlflow_url, secret)
    missing = [name for name in settings.integrations if name not in found]
    if missing:
        raise MergeError(
            f"{ENV_PREFIX}INTEGRATIONS names {', '.join(missing)}, which this deployment does not"
            f" configure; configured: {', '.join(found) or 'none'}.",
            code="bad_setting",
        )
    return found


def check_integrations(
    asked: Sequence[JobIntegration], integrations: Mapping[str, Integration]
) -> tuple[JobIntegration, ...]:
    """What a job asks for, with its options in full.

    Raises:
        RequestError: ``bad_integration``: this deployment has no such integration, it is named
            twice, or its options are wrong.
    """
    faults, checked = [], []
    names = [entry.name for entry in asked]
    for index, entry in enumerate(asked):
        place = f"/integrations/{index}"
        integration = integrations.get(entry.name)
        if integration is None or entry.name in names[:index]:
            known = ", ".join(sorted(integrations)) or "none"
            reason = "It is named twice." if integration else f"This deployment has: {known}."
            faults.append(_fault(f"{place}/name", f"{entry.name}: {reason}"))
            continue
        try:
            options = integration.options.model_validate(entry.options)
        except ValidationError as error:
            for item in error.errors(include_input=False):
                where = "/".join(map(str, ("options", *item["loc"])))
                faults.append(_fault(f"{place}/{where}", f"{item['msg']}."))
            continue
        checked.append(JobIntegration(entry.name, options.model_dump(mode="json")))
    if faults:
        raise RequestError(faults[0].detail, code="bad_integration", faults=faults)
    return tuple(checked)


def _fault(pointer: str, detail: str) -> Fault:
    return Fault(pointer, "bad_integration", detail)
