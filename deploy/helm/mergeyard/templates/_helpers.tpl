{{- define "mergeyard.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "mergeyard.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mergeyard.labels" -}}
{{ include "mergeyard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "mergeyard.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "mergeyard.gpuImage" -}}
{{- with .Values.image -}}
{{- $tag := .gpuTag | default (printf "%s-gpu" (.tag | default $.Chart.AppVersion)) -}}
{{- if .gpuDigest }}{{ .repository }}@{{ .gpuDigest }}{{ else }}{{ .repository }}:{{ $tag }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "mergeyard.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}{{ include "mergeyard.fullname" . }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end -}}
{{- end -}}

{{- define "mergeyard.authSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-auth" (include "mergeyard.fullname" .)) -}}
{{- end -}}

{{- define "mergeyard.rayName" -}}{{ include "mergeyard.fullname" . }}-ray{{- end -}}

{{- define "mergeyard.rayAddress" -}}
{{- .Values.ray.existingAddress | default (printf "%s-head-svc:6379" (include "mergeyard.rayName" .)) -}}
{{- end -}}

{{- define "mergeyard.hasGpus" -}}
{{- range .Values.ray.workerGroups }}{{ if gt (int .gpus) 0 }}yes{{ end }}{{ end -}}
{{- end -}}

{{- define "mergeyard.databaseHost" -}}
{{- if .Values.database.embedded.enabled }}{{ include "mergeyard.fullname" . }}-postgres{{ else }}{{ required "database.host must name a PostgreSQL (or set database.embedded.enabled for a trial)" .Values.database.host }}{{ end -}}
{{- end -}}

{{- define "mergeyard.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "mergeyard.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "mergeyard.imagePullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* What every process of ours reads that touches models. */ -}}
{{- define "mergeyard.storageEnv" -}}
- {name: AWS_REGION, value: {{ .Values.storage.s3.region | quote }}}
{{- with .Values.storage.s3.endpoint }}
- {name: AWS_ENDPOINT_URL_S3, value: {{ . | quote }}}
{{- end }}
{{- with .Values.storage.s3.existingSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $.Values.storage.s3.existingSecret }}, key: {{ . }}}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "mergeyard.tracesEnv" -}}
{{- with .Values.monitoring.traces.headersSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end -}}

{{- define "mergeyard.rayEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "mergeyard.authSecret" . }}, key: ray-token}}
{{- end -}}

{{- define "mergeyard.databaseEnv" -}}
{{- with .Values.database }}
- name: MERGEYARD_DATABASE_URL
  value: "postgresql://{{ .user }}@{{ include "mergeyard.databaseHost" $ }}:{{ .port }}/{{ .name }}{{ with .parameters }}?{{ . }}{{ end }}"
# libpq reads it by itself: so the password needs no encoding, and is not part of the address.
- name: PGPASSWORD
  valueFrom:
    secretKeyRef:
{{- if .embedded.enabled }}
      name: {{ include "mergeyard.fullname" $ }}-postgres
      key: password
{{- else }}
      name: {{ required "database.passwordSecret must name the Secret with the password" .passwordSecret }}
      key: {{ .passwordKey }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Settings of the service; the chart's own names first, so that `settings` cannot be doubled. */ -}}
{{- define "mergeyard.serviceEnv" -}}
- {name: MERGEYARD_HOST, value: "0.0.0.0"}
- {name: MERGEYARD_PORT, value: "8000"}
- {name: MERGEYARD_LOG_JSON, value: "true"}
- {name: MERGEYARD_STORAGE_ROOTS, value: {{ .Values.storage.roots | toJson | quote }}}
{{- if and .Values.ingress.enabled (ne .Values.ingress.path "/") }}
- {name: MERGEYARD_ROOT_PATH, value: {{ .Values.ingress.path | trimSuffix "/" | quote }}}
{{- end }}
- name: MERGEYARD_ADMIN_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "mergeyard.authSecret" . }}, key: admin-token}}
# Of webhooks; the same in all replicas.
- name: MERGEYARD_SECRET_KEYS
  valueFrom: {secretKeyRef: {name: {{ include "mergeyard.authSecret" . }}, key: secret-keys}}
{{- if and .Values.ingress.enabled .Values.ingress.host (not (hasKey .Values.settings "public_url")) }}
- {name: MERGEYARD_PUBLIC_URL, value: "{{ ternary "https" "http" (ne "" .Values.ingress.tlsSecret) }}://{{ .Values.ingress.host }}{{ .Values.ingress.path | trimSuffix "/" }}"}
{{- end }}
{{ include "mergeyard.databaseEnv" . | trim }}
{{ include "mergeyard.storageEnv" . | trim }}
{{ include "mergeyard.tracesEnv" . | trim }}
{{- range $name, $value := .Values.settings }}
- {name: MERGEYARD_{{ $name | upper }}, value: {{ include "mergeyard.text" $value | quote }}}
{{- end }}
{{- range $name, $from := .Values.secretSettings }}
- name: MERGEYARD_{{ $name | upper }}
  valueFrom: {secretKeyRef: {name: {{ $from.name }}, key: {{ $from.key }}}}
{{- end }}
{{- end -}}

{{- define "mergeyard.claimMounts" -}}
{{- range $number, $claim := .Values.storage.claims }}
- {name: models-{{ $number }}, mountPath: {{ $claim.mountPath }}, readOnly: {{ $claim.readOnly | default false }}}
{{- end }}
{{- end -}}

{{- define "mergeyard.claimVolumes" -}}
{{- range $number, $claim := .Values.storage.claims }}
- name: models-{{ $number }}
  persistentVolumeClaim: {claimName: {{ $claim.claimName }}, readOnly: {{ $claim.readOnly | default false }}}
{{- end }}
{{- end -}}

{{- /* The two folders of the image that are written to. */ -}}
{{- define "mergeyard.scratchMounts" -}}
- {name: data, mountPath: /var/lib/mergeyard}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "mergeyard.scratchVolumes" -}}
- {name: data, emptyDir: {sizeLimit: 2Gi}}
- {name: tmp, emptyDir: {sizeLimit: 4Gi}}
{{- end -}}

{{- define "mergeyard.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  timeoutSeconds: 6
{{- end -}}

{{- /* Ray's own answers, which need no token; KubeRay's default asks with a program that the image lacks. */ -}}
{{- define "mergeyard.rayProbes" -}}
startupProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 2
  failureThreshold: 90
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  httpGet: {path: {{ . }}, port: {{ ternary 8265 52365 (eq . "/api/gcs_healthz") }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 10
{{- end -}}

{{- /* A value as text; a large whole number as its digits, which Helm would write as 2.097152e+06. */ -}}
{{- define "mergeyard.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end -}}
{{- end -}}
