"""The Helm chart: what it renders is valid, closed, and says what the values say."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.jobs.states import JobState
from service.metrics import Metrics
from service.settings import ENV_PREFIX, Settings
from tests.support.documents import REPOSITORY, anchors
from tests.support.helm import (
    CHART,
    Helm,
    Manifest,
    containers,
    manifests,
    pod_specs,
    unpack_helm,
)

VALUES = sorted((CHART / "ci").glob("*.yaml"))
KUBERNETES = "1.37"
RAYCLUSTER_SCHEMA = "MERGEYARD_RAYCLUSTER_SCHEMA"
NO_SCHEMA = {"RayCluster", "ServiceMonitor", "PrometheusRule"}  # of operators, not of Kubernetes
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
SECRET_WORDS = re.compile(r"PASSWORD|TOKEN|SECRET|KEY", re.IGNORECASE)


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    folder = tmp_path_factory.mktemp("helm")
    return Helm(unpack_helm(folder), folder)


@pytest.fixture(params=VALUES, ids=lambda path: path.stem)
def values(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def rendered(helm: Helm, values: Path) -> list[Manifest]:
    return manifests(helm.template(values))


def render(helm: Helm, name: str, *more: str) -> list[Manifest]:
    return manifests(helm.template(CHART / "ci" / f"{name}.yaml", *more))


def one(found: list[Manifest], kind: str, ending: str = "") -> Manifest:
    (item,) = (
        item for item in found if item["kind"] == kind and item["metadata"]["name"].endswith(ending)
    )
    return item


def environment(found: list[Manifest], ending: str, container: str) -> dict[str, Any]:
    """Variables of one container of a Deployment: the value, or where it comes from."""
    pod = one(found, "Deployment", ending)["spec"]["template"]["spec"]
    (item,) = (item for item in containers(pod) if item["name"] == container)
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in item["env"]}


# -- valid


def test_there_are_values_for_six_kinds_of_deployment() -> None:
    assert len(VALUES) >= 6


def test_lint_finds_nothing(helm: Helm, values: Path) -> None:
    done = helm.run("lint", "--strict", CHART, f"--values={values}")
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def test_kubernetes_knows_every_field(helm: Helm, values: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("pip install kubernetes-validate")
    found = manifests(helm.template(values))
    path = tmp_path / "rendered.yaml"
    path.write_text(yaml.safe_dump_all(x for x in found if x["kind"] not in NO_SCHEMA))
    program = Path(sys.executable).with_name("kubernetes-validate")
    done = subprocess.run(
        [program, "--strict", "-k", KUBERNETES, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses what it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in made and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made


def test_kuberay_knows_every_field(rendered: list[Manifest]) -> None:
    clusters = [item for item in rendered if item["kind"] == "RayCluster"]
    if not clusters:
        return
    path = os.environ.get(RAYCLUSTER_SCHEMA)
    if not path:
        pytest.skip(f"{RAYCLUSTER_SCHEMA} does not name the schema of KubeRay's RayCluster (v1)")
    schema = json.loads(Path(path).read_text())["schema"]["properties"]["spec"]
    for cluster in clusters:
        jsonschema.validate(cluster["spec"], strict(schema))
        broken = copy.deepcopy(cluster["spec"])
        broken["workerGroupSpecs"][0]["maxReplica"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, strict(schema))


def test_the_readme_is_made_from_the_values() -> None:
    made = runpy.run_path(str(CHART.parent / "readme.py"))["make_readme"]()
    assert (CHART / "README.md").read_text() == made, "run `python deploy/helm/readme.py`"


# -- refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--set=storage.roots={models}", "storage"),
        ("--set=storage.roots=null", "/storage"),
        ("--set=database.embedded.enabled=false", "database.host must name"),
        ("--set=apii.replicas=1", "apii"),
        ("--set=api.replicas=0", "replicas"),
        ("--set=settings.admin_token=abc", "'admin_token'"),
        ("--set=image.digest=sha256:12", "digest"),
        ("--set=ray.workerGroups=null", "workerGroups"),
        ("--set=monitoring.serviceMonitor.enabled=true", "tokenSecret must name"),
        ("--set=monitoring.traces.headersSecret.name=collector", "key"),
    ],
)
def test_values_that_cannot_work_are_refused(helm: Helm, given: str, said: str) -> None:
    command = ("template", "rel", CHART, f"--values={CHART}/ci/trial.yaml", given)
    done = helm.run(*command)
    assert done.returncode != 0
    assert said in done.stderr


# -- closed


def test_every_pod_is_confined(rendered: list[Manifest]) -> None:
    for name, pod in pod_specs(rendered):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["enableServiceLinks"] is False, name
        is_head = name.endswith("/head")  # its autoscaler asks Kubernetes for workers
        assert is_head or pod["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert all("hostPath" not in volume for volume in pod.get("volumes", ())), name
        for container in containers(pod):
            where = f"{name}/{container['name']}"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, where
            assert "memory" in container["resources"]["limits"], where
            assert container["image"].rpartition(":")[2] != "latest", where


def test_what_runs_on_is_probed(rendered: list[Manifest]) -> None:
    for name, pod in pod_specs(rendered):
        if name.startswith(("Job/", "Pod/")):
            continue
        for container in pod["containers"]:
            assert set(PROBES) <= container.keys(), f"{name}/{container['name']}"
        for helper in pod.get("initContainers", ()):
            assert {"startupProbe", "livenessProbe"} <= helper.keys(), name


def test_no_secret_lies_in_the_open(rendered: list[Manifest]) -> None:
    for name, pod in pod_specs(rendered):
        for container in containers(pod):
            for entry in container.get("env", ()):
                if SECRET_WORDS.search(entry["name"]):
                    assert "secretKeyRef" in entry["valueFrom"], f"{name}: {entry['name']}"
            assert "password" not in json.dumps(container.get("args", [])).lower()
    for item in rendered:
        if item["kind"] == "ConfigMap":
            assert "BEGIN" not in json.dumps(item["data"])


def test_mounted_folders_are_the_only_ones_written_to(rendered: list[Manifest]) -> None:
    for name, pod in pod_specs(rendered):
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        if name.startswith("StatefulSet/"):
            volumes.add("data")
        for container in containers(pod):
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes, name
            assert "/tmp" in mounts, name


def test_every_variable_is_a_setting_and_set_once(rendered: list[Manifest]) -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    of_the_test = {"MERGEYARD_URL", "MERGEYARD_TOKEN", "MERGEYARD_TEST_ROOT"}
    for name, pod in pod_specs(rendered):
        for container in containers(pod):
            names = [entry["name"] for entry in container.get("env", ())]
            assert len(names) == len(set(names)), name
            ours = {variable for variable in names if variable.startswith(ENV_PREFIX)}
            allowed = known | (of_the_test if name.startswith("Pod/") else set())
            assert ours <= allowed, name


def test_everything_is_denied_that_is_not_allowed(rendered: list[Manifest], values: Path) -> None:
    policies = [item for item in rendered if item["kind"] == "NetworkPolicy"]
    if values.stem == "open":
        assert policies == []
        return
    (deny,) = (item for item in policies if item["metadata"]["name"].endswith("-deny"))
    ours = {"app.kubernetes.io/name": "mergeyard", "app.kubernetes.io/instance": "rel"}
    assert deny["spec"]["podSelector"] == {"matchLabels": ours}
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny["spec"]
    for _, labels in labels_of_pods(rendered):
        assert ours.items() <= labels.items()
    for policy in policies:
        for rule in policy["spec"].get("ingress", ()):
            is_ours = "from" in rule or policy["metadata"]["name"].endswith("-existing-ray")
            assert is_ours, policy["metadata"]["name"]


def labels_of_pods(found: list[Manifest]) -> list[tuple[str, dict[str, str]]]:
    labels = []
    for item in found:
        spec = item.get("spec", {})
        if item["kind"] == "RayCluster":
            groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
            labels += [("ray", group["template"]["metadata"]["labels"]) for group in groups]
        elif "template" in spec:
            labels.append((item["kind"], spec["template"]["metadata"]["labels"]))
        elif item["kind"] == "Pod":
            labels.append(("Pod", item["metadata"]["labels"]))
    return labels


def test_nobody_but_ray_reaches_ray(helm: Helm) -> None:
    found = render(helm, "prefix")
    ray = one(found, "NetworkPolicy", "-ray")["spec"]
    (rule,) = ray["ingress"]
    (peer,) = rule["from"]
    (expression,) = peer["podSelector"]["matchExpressions"]
    assert sorted(expression["values"]) == ["ray-head", "ray-worker", "runner"]
    metrics = one(found, "NetworkPolicy", "-metrics")["spec"]["ingress"]
    assert metrics[0]["ports"] == [{"port": "http"}, {"port": "metrics"}]
    assert "namespaceSelector" in metrics[0]["from"][0]


# -- as the values say


def test_the_api_answers_and_runners_drive(helm: Helm) -> None:
    found = render(helm, "aws")
    api, runner = environment(found, "-api", "api"), environment(found, "-runner", "runner")
    assert api["MERGEYARD_RUN_JOBS"] == "false"
    assert "MERGEYARD_RUN_JOBS" not in runner
    assert "RAY_AUTH_TOKEN" not in api
    assert runner["MERGEYARD_RAY_ADDRESS"] == "merges-ray-head-svc:6379"
    assert runner["MERGEYARD_TASK_GPUS"] == "1"
    assert runner["MERGEYARD_MAX_IN_FLIGHT_SHARDS"] == str(16 * 8 + 2)
    assert runner["MERGEYARD_DATABASE_URL"] == (
        "postgresql://mergeyard@merges.abc.eu-central-1.rds.amazonaws.com:5432/mergeyard"
        "?sslmode=verify-full&sslrootcert=system"
    )
    assert runner["PGPASSWORD"] == {"secretKeyRef": {"name": "merges-database", "key": "password"}}
    assert json.loads(api["MERGEYARD_STORAGE_ROOTS"]) == ["s3://models/base", "s3://models/merged"]
    assert "AWS_ACCESS_KEY_ID" not in api  # the role of the service account
    service = one(found, "Service", "merges")["spec"]["selector"]
    assert service["app.kubernetes.io/component"] == "api"


def test_gpu_groups_take_gpus_and_their_image(helm: Helm) -> None:
    (group,) = one(render(helm, "aws"), "RayCluster")["spec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["image"] == "mergeyard:0.1.0-gpu"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert group["rayStartParams"]["num-gpus"] == "8"
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 16)
    cpu, gpu = one(render(helm, "air-gapped"), "RayCluster")["spec"]["workerGroupSpecs"]
    images = [group["template"]["spec"]["containers"][0]["image"] for group in (cpu, gpu)]
    assert images == [f"registry.internal/mergeyard@sha256:{n:064d}" for n in (1, 2)]


def test_ray_has_its_token_everywhere(rendered: list[Manifest]) -> None:
    for name, pod in pod_specs(rendered):
        for container in containers(pod):
            if name.startswith("RayCluster/") or container["name"] in ("ray-node", "runner"):
                variables = {entry["name"]: entry for entry in container["env"]}
                assert variables["RAY_AUTH_MODE"]["value"] == "token"
                assert (
                    variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "ray-token"
                )
    for item in rendered:
        if item["kind"] == "RayCluster" and item["spec"].get("enableInTreeAutoscaling"):
            names = {entry["name"] for entry in item["spec"]["autoscalerOptions"]["env"]}
            assert names == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_a_path_prefix_reaches_proxy_and_service(helm: Helm) -> None:
    found = render(helm, "prefix")
    (path,) = one(found, "Ingress")["spec"]["rules"][0]["http"]["paths"]
    assert path["path"] == "/mergeyard"
    variables = environment(found, "-api", "api")
    assert variables["MERGEYARD_ROOT_PATH"] == "/mergeyard"
    assert variables["MERGEYARD_PUBLIC_URL"] == "http://tools.example.com/mergeyard"


def test_an_existing_cluster_is_joined_and_none_is_made(helm: Helm) -> None:
    found = render(helm, "existing-ray")
    assert not any(item["kind"] in ("RayCluster", "Secret", "ServiceAccount") for item in found)
    runner = environment(found, "-runner", "runner")
    assert runner["MERGEYARD_RAY_ADDRESS"] == "ray-head.ray:6379"
    assert runner["RAY_AUTH_TOKEN"]["secretKeyRef"]["name"] == "mergeyard-tokens"
    assert runner["PGPASSWORD"]["secretKeyRef"] == {"name": "merges-database", "key": "pg"}


def test_other_settings_pass_through(helm: Helm) -> None:
    found = render(helm, "open")
    for ending, container in (("-api", "api"), ("-runner", "runner")):
        variables = environment(found, ending, container)
        assert variables["MERGEYARD_LEASE_SECONDS"] == "60"
        assert variables["MERGEYARD_BODY_LIMIT_BYTES"] == "2097152"
        secret = {"secretKeyRef": {"name": "mlflow", "key": "token"}}
        assert variables["MERGEYARD_MLFLOW_CREDENTIALS"] == secret


def test_service_and_workers_have_the_headers_of_the_collector_of_traces(helm: Helm) -> None:
    found = render(helm, "open")
    wanted = {"secretKeyRef": {"name": "collector", "key": "headers"}}
    for ending, container in (("-api", "api"), ("-runner", "runner")):
        assert environment(found, ending, container)["OTEL_EXPORTER_OTLP_HEADERS"] == wanted
    (cluster,) = (item for item in found if item["kind"] == "RayCluster")
    for group in cluster["spec"]["workerGroupSpecs"]:
        (worker,) = group["template"]["spec"]["containers"]
        given = {"name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": wanted}
        assert given in worker["env"]


@pytest.mark.parametrize(("name", "first"), [("trial", "post-install"), ("aws", "pre-install")])
def test_the_database_is_migrated_by_a_hook(helm: Helm, name: str, first: str) -> None:
    job = one(render(helm, name), "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == f"{first},pre-upgrade"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mergeyard", "migrate"]
    # Before an installation nothing else of the release is there.
    needed = [
        entry["valueFrom"]["secretKeyRef"]["name"]
        for entry in container["env"]
        if "valueFrom" in entry
    ]
    made = {item["metadata"]["name"] for item in render(helm, name) if item["kind"] == "Secret"}
    assert first == "post-install" or not made & set(needed)


def test_replicas_grow_and_are_kept(helm: Helm) -> None:
    found = render(helm, "aws")
    assert one(found, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 6
    assert "replicas" not in one(found, "Deployment", "-api")["spec"]
    budgets = [item for item in found if item["kind"] == "PodDisruptionBudget"]
    assert {item["metadata"]["name"] for item in budgets} == {"merges-api", "merges-runner"}


# -- watched


def metric_names() -> set[str]:
    metrics = Metrics("0")
    metrics.count_request("GET", "/", 200, 0.1)
    metrics.jobs_submitted.labels("linear").inc()
    text = metrics.render(dict.fromkeys(JobState, 0), 0, 0.0).decode()
    return set(re.findall(r"^(mergeyard_\w+)", text, re.MULTILINE))


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    known = metric_names()
    alerts = (CHART / "files" / "alerts.yaml").read_text()
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    for text in (alerts, *asked):
        assert set(re.findall(r"\bmergeyard_\w+", text)) <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_prometheus_finds_replicas_and_runners(helm: Helm) -> None:
    found = render(helm, "prefix")
    service = one(found, "Service", "-metrics")
    monitor = one(found, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    wanted = service["spec"]["selector"].items()
    served = [kind for kind, labels in labels_of_pods(found) if wanted <= labels.items()]
    assert served == ["Deployment", "Deployment"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == "mergeyard-metrics"


def test_the_rules_are_rendered_for_the_namespace(helm: Helm) -> None:
    found = render(helm, "prefix")
    rules = one(found, "PrometheusRule")["spec"]["groups"][0]["rules"]
    for rule in rules:
        assert 'namespace="ns"' in rule["expr"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor in anchors(REPOSITORY / document)
    board = json.loads(one(found, "ConfigMap", "-dashboard")["data"]["mergeyard.json"])
    assert board["title"] == "Mergeyard"


def test_prometheus_understands_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    command = [promtool, "check", "rules", CHART / "files" / "alerts.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
