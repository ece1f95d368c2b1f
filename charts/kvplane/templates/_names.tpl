{{/* "kvplane" and the release's name, without saying it twice. Begins with a letter, as a Service must, and leaves room for
a suffix. */}}
{{- define "kvplane.fullname" -}}
{{ hasPrefix "kvplane" .Release.Name | ternary .Release.Name (print "kvplane-" .Release.Name) | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* The operator's Deployment, Service, Lease, and roles. */}}
{{- define "kvplane.operator" -}}
{{ include "kvplane.fullname" . }}-operator
{{- end }}

{{- define "kvplane.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "kvplane.operator" .) }}
{{- else -}}
{{ required "serviceAccount.name must name an existing ServiceAccount, because serviceAccount.create is false." .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{- define "kvplane.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What never changes for a release: selectors are immutable. */}}
{{- define "kvplane.selector" -}}
app.kubernetes.io/name: kvplane
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "kvplane.labels" -}}
{{ include "kvplane.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: kvplane
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end }}

{{/* Pod and container settings that the pod security standard "restricted" asks for. */}}
{{- define "kvplane.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "kvplane.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Settings that the operator and its self-test share; the names are fields of kvplane_operator.settings. */}}
{{- define "kvplane.commonEnv" -}}
- name: KVPLANE_OPERATOR_WATCH_NAMESPACES
  value: {{ join "," .Values.watchNamespaces | quote }}
- name: KVPLANE_OPERATOR_LEASE_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: KVPLANE_OPERATOR_LEASE_NAME
  value: {{ include "kvplane.operator" . }}
- name: KVPLANE_OPERATOR_LOG_LEVEL
  value: {{ .Values.logLevel }}
{{- end }}
