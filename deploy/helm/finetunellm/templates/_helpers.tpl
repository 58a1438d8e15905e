{{- /* Names and labels. Arguments: root, component (edge, inference, history), model (or nil). */ -}}

{{- define "finetunellm.name" -}}
{{- $parts := compact (list .root.Release.Name .component (dig "name" "" (default dict .model))) -}}
{{- $name := join "-" $parts -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$" $name) -}}
{{- fail (printf "%s (%d characters) is no name for Kubernetes, which takes at most 63 of a-z, 0-9 and -, and a letter first: choose another name for the release or the model." $name (len $name)) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "finetunellm.selector" -}}
app.kubernetes.io/name: finetunellm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
finetunellm/model: {{ .name }}
{{- end }}
{{- end -}}

{{- define "finetunellm.labels" -}}
{{ include "finetunellm.selector" . }}
app.kubernetes.io/part-of: finetunellm
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* Merge the map `over` into `base` as JSON, also where its values are false, 0 or empty. */ -}}
{{- define "finetunellm.merged" -}}
{{- $result := deepCopy .base -}}
{{- range $key, $value := .over -}}
{{- $old := get $result $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $old) -}}
{{- $value = include "finetunellm.merged" (dict "base" $old "over" $value) | fromJson -}}
{{- end -}}
{{- $_ := set $result $key $value -}}
{{- end -}}
{{- toJson $result -}}
{{- end -}}

{{- /* The values of a model: those of `inference`, and its own. Arguments: root, model. */ -}}
{{- define "finetunellm.model" -}}
{{- include "finetunellm.merged" (dict "base" .root.Values.inference "over" .model) -}}
{{- end -}}

{{- /* The name of a model in requests and metrics, as services/inference/model_path.py makes it. */ -}}
{{- define "finetunellm.modelName" -}}
{{- regexReplaceAll "(-[0-9]{5}-of-[0-9]{5}\\.gguf|\\.[^.]*)$" (base .file) "" -}}
{{- end -}}

{{- /* Arguments: root, component, image. */ -}}
{{- define "finetunellm.image" -}}
{{- $image := .root.Values.image -}}
{{- $version := default .root.Chart.AppVersion $image.tag -}}
image: {{ printf "%s%s:%s" $image.registry .image $version | quote }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end -}}

{{- define "finetunellm.natsUrl" -}}
{{- if .Values.nats.enabled -}}
{{- $scheme := ternary "tls" "nats" .Values.nats.config.nats.tls.enabled -}}
{{- printf "%s://%s:%v" $scheme (include "nats.fullname" .Subcharts.nats) .Values.nats.config.nats.port -}}
{{- else -}}
{{- required "settings.NATS_URL is empty: name your NATS servers, or set nats.enabled." .Values.settings.NATS_URL -}}
{{- end -}}
{{- end -}}

{{- /* The list `env`, the last one of `settings` first in rank. Arguments: root, component, settings. */ -}}
{{- define "finetunellm.env" -}}
{{- $own := dict
  "NATS_URL" (include "finetunellm.natsUrl" .root)
  "NATS_CREDS" "/etc/finetunellm/nats/nats.nk"
  "NATS_INBOX_PREFIX" (printf "_INBOX.%s" .component) -}}
{{- $env := dict -}}
{{- range $settings := concat (list $own .root.Values.settings) .settings -}}
{{- range $name, $value := $settings -}}
{{- $_ := set $env $name $value -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $env }}
- name: {{ $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end -}}
{{- end -}}

{{- /* The settings of a pod that are no values of its containers. Arguments: name's, and values. */ -}}
{{- define "finetunellm.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
shareProcessNamespace: true # SIGTERM ends a Python that still starts: it is not process 1
securityContext: {{ toJson .root.Values.podSecurityContext }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .values.affinity }}
affinity: {{ toJson . }}
{{- end }}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: { matchLabels: {{ include "finetunellm.selector" $ | fromYaml | toJson }} }
{{- end }}
{{- end -}}

{{- define "finetunellm.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{- /* The volumes of every service, and where they are mounted. */ -}}
{{- define "finetunellm.volumes" -}}
- name: tmp
  emptyDir: {}
- name: nats
  secret:
    secretName: {{ default (printf "%s-nats-%s" .root.Release.Name .component) (get .root.Values.natsKeys .component) }}
    items: [{ key: nats.nk, path: nats.nk }]
    defaultMode: 0440
{{- with .root.Values.natsTlsSecret }}
- name: nats-tls
  secret: { secretName: {{ . }}, defaultMode: 0440 }
{{- end }}
{{- end -}}

{{- define "finetunellm.mounts" -}}
- { name: tmp, mountPath: /tmp }
- { name: nats, mountPath: /etc/finetunellm/nats, readOnly: true }
{{- with .root.Values.natsTlsSecret }}
- { name: nats-tls, mountPath: /etc/finetunellm/nats-tls, readOnly: true }
{{- end }}
{{- end -}}

{{- /*
Probes of a service without HTTP. An outage of NATS looks like a process that hangs, and a restart
would cost its model or its caches: so it is restarted after ten minutes only. Readiness is what
updates wait for. Arguments: component, startSeconds.
*/ -}}
{{- define "finetunellm.busProbes" -}}
{{- $check := printf "[python, -m, services.runtime.health, %s]" .component -}}
startupProbe:
  exec: { command: {{ $check }} }
  periodSeconds: 10
  timeoutSeconds: 15
  failureThreshold: {{ div (add .startSeconds 9) 10 }}
readinessProbe:
  exec: { command: {{ $check }} }
  periodSeconds: 20
  timeoutSeconds: 15
  failureThreshold: 3
livenessProbe:
  exec: { command: {{ $check }} }
  periodSeconds: 60
  timeoutSeconds: 30
  failureThreshold: 10
{{- end -}}

{{- /* Arguments: those of name. One pod at a time is evicted, also where there is only one. */ -}}
{{- define "finetunellm.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "finetunellm.name" . }}
  labels: {{ include "finetunellm.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector: { matchLabels: {{ include "finetunellm.selector" . | fromYaml | toJson }} }
{{- end -}}
