import torch.nn.functional as F
def soft_target_ce(logits, targets):
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()
def kd(student_logits, teacher_logits, tau=1.0, kind="soft", reduction="batchmean"):
    if kind == "hard":
        return F.cross_entropy(student_logits, teacher_logits.argmax(-1))
    log_p = F.log_softmax(student_logits / tau, dim=-1)
    loss = F.kl_div(log_p, F.log_softmax(teacher_logits / tau, dim=-1), reduction="sum", log_target=True) * tau**2
    return loss / (log_p.numel() if reduction == "mean" else len(log_p))
